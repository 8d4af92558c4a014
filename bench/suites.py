"""Which workloads each section times, and on which candidates."""

from collections.abc import Iterator
from pathlib import Path

from bench import workloads
from bench.peers import (
    CUDA_CANDIDATES,
    CUDA_COMPILE,
    CUDA_GRAPH,
    CUDA_GRAPH_TF32,
    JAX,
    ONNX,
    OURS,
    TORCH,
    TORCH_COMPILE,
    TORCH_LOOP,
    TORCH_NHWC,
    Candidate,
    Sizes,
)
from bench.workloads import UPDATES, Workload, label_sizes
from npser.recipes import ARCHITECTURES

BATCHES = (1, 8, 32, 128)
COLUMNS = {
    "kernels": (OURS, TORCH, TORCH_NHWC, TORCH_COMPILE, JAX, ONNX),
    "train": (OURS, TORCH, TORCH_NHWC, TORCH_LOOP, TORCH_COMPILE, JAX),
    "infer": (OURS, TORCH, TORCH_NHWC, TORCH_COMPILE, JAX, ONNX),
    "growth": (OURS,),
}
CUDA_COLUMNS = {
    "kernels": tuple(c for c in CUDA_CANDIDATES if c not in (CUDA_GRAPH, CUDA_GRAPH_TF32)),
    "train": CUDA_CANDIDATES,
    "infer": CUDA_CANDIDATES,
}
MEMORY = (OURS, TORCH, TORCH_LOOP)
UTTERANCES, SEGMENT_HOP = 8, 8  # of the built-in corpus; frames from one window to the next
CORPUS_HOP = {"cnn": 16, "lstm": 16, "tdcnn": 32}  # the same, of a whole corpus


def candidates(section: str, quick: bool, device: str = "cpu") -> list[Candidate]:
    """The columns of a section. A quick look waits for no C++ compiler."""
    columns = COLUMNS if device == "cpu" else CUDA_COLUMNS
    return [c for c in columns[section] if not (quick and c in (TORCH_COMPILE, TORCH_LOOP, CUDA_COMPILE))]


# --- kernels -----------------------------------------------------------------------------------------------------


def _conv(
    kind: str, name: str, B: int, T: int, F: int, C: int, O: int, backward: bool, need_dx: bool = True
) -> Workload:
    what = "forward" if not backward else "forward + backward" + ("" if need_dx else " without dx")
    sizes = {"B": B, "T": T, "F": F, "C": C, "O": O, "backward": backward, "need_dx": need_dx}
    return Workload(kind, f"{name} {C}->{O}, {T}x{F}, B {B}: {what}", sizes)


def _dense(what: str, N: int, I: int, J: int) -> Workload:
    sizes = {"N": N, "I": I, "J": J}
    return Workload(f"dense_{what.replace(' ', '_')}", f"dense ({N}, {I} -> {J}): {what}", sizes)


def _lstm(B: int, T: int, I: int, H: int, backward: bool) -> Workload:
    what = "forward + backward" if backward else "forward"
    sizes = {"B": B, "T": T, "I": I, "H": H, "backward": backward}
    return Workload("lstm", f"lstm layer B {B}, T {T}, {I}->{H}: {what}", sizes)


def kernels(quick: bool) -> Iterator[Workload]:
    """Every operation, forward and backward, at the networks' shapes and a few others."""
    if quick:
        yield _conv("conv_block", "block", 32, 128, 128, 1, 32, backward=True, need_dx=False)
        yield _conv("conv_block", "block", 32, 64, 64, 32, 32, backward=False)
        yield _conv("conv_block", "block", 32, 64, 64, 32, 32, backward=True)
        yield _conv("conv3x3", "convolution", 32, 64, 64, 32, 32, backward=False)
        yield _lstm(32, 128, 128, 128, backward=True)
        return
    for B in BATCHES:
        for T, C in ((128, 1), (64, 32)):
            yield _conv("conv_block", "block", B, T, T, C, 32, backward=False)
            yield _conv("conv_block", "block", B, T, T, C, 32, backward=True, need_dx=C > 1)
    for T, C in ((128, 1), (64, 32)):
        yield _conv("conv3x3", "convolution", 32, T, T, C, 32, backward=False)
        yield _conv("conv3x3", "convolution", 32, T, T, C, 32, backward=True)
    for N, I, J in ((32, 32768, 1024), (128, 32768, 4096), (4096, 128, 512)):
        for what in ("forward", "backward input", "update"):
            yield _dense(what, N, I, J)
    for B, T, I, H in ((32, 128, 128, 128), (32, 4, 1024, 1024)):
        for backward in (False, True):
            yield _lstm(B, T, I, H, backward)
    pooled = 32 * 64 * 64 * 32  # numbers behind the first block at batch 32
    yield Workload("dropout", "dropout of (32, 64, 64, 32)", {"N": pooled}, tolerance=0.01)
    yield Workload("relu", "ReLU of (32, 64, 64, 32): forward + backward", {"N": pooled})
    yield Workload(
        "maxpool", "max-pooling of (32, 64, 64, 32): forward + backward", {"B": 32, "T": 64, "F": 64, "C": 32}
    )
    yield Workload("cross_entropy", "softmax + cross-entropy (32, 7): forward + backward", {"B": 32, "K": 7})
    yield Workload("cross_entropy", "softmax + cross-entropy (4096, 1000): forward + backward", {"B": 4096, "K": 1000})
    yield Workload("sgd", "SGD with momentum, 33.5 million", {"N": 32768 * 1024})
    yield Workload("stft", "STFT magnitudes of 10 s", {"N": 160_000})
    # Odd shapes: nothing is a whole number of vectors or tiles.
    yield _conv("conv_block", "block", 3, 50, 37, 5, 48, backward=True)
    yield _conv("conv3x3", "convolution", 4, 95, 61, 3, 16, backward=True)
    for what in ("forward", "backward input", "update"):
        yield _dense(what, 33, 1000, 777)
    yield _lstm(5, 37, 60, 100, backward=True)


# --- whole networks ----------------------------------------------------------------------------------------------


def _network(arch: str, B: int, **model: int) -> Sizes:
    return {"arch": arch, "B": B, "model": model}


def _step(arch: str, B: int, trained: Path | None = None) -> Workload:
    sizes, after = _trained(_network(arch, B), trained)
    return Workload("train", f"{arch} training step, B {B}{after}", sizes, tolerance=1e-3)


def _batch(arch: str, B: int, trained: Path | None = None) -> Workload:
    sizes, after = _trained(_network(arch, B), trained)
    return Workload("infer", f"{arch} inference, B {B}{after}", sizes)


def _trained(sizes: Sizes, trained: Path | None) -> tuple[Sizes, str]:
    """The sizes with convolutions from a file of `workloads.train_convolutions`, and what a title says of it."""
    return (sizes, "") if trained is None else (sizes | {"trained": str(trained)}, f", after {UPDATES} updates")


def train(quick: bool, trained: Path | None) -> Iterator[Workload]:
    """One training step of each network: forward, backward and update, dropout on."""
    for arch in ("cnn",) if quick else ARCHITECTURES:
        for B in (32,) if quick else BATCHES:
            yield _step(arch, B)
    for arch in ("cnn", "tdcnn") if trained else ():
        yield _step(arch, 32, trained)


def memory() -> Iterator[Workload]:
    """The peak memory of a fresh process that trains each network at batch 32."""
    for arch in ARCHITECTURES:
        yield Workload("memory", f"{arch} training, B 32", _network(arch, 32))


def infer(
    quick: bool, trained: Path | None, recorded: Path, corpus: Path, corpus_name: str, device: str = "cpu"
) -> Iterator[Workload]:
    """Batches of windows; then, on the cpu, utterances, from samples to label, a few and a whole corpus."""
    for arch in ("cnn",) if quick else ARCHITECTURES:
        for B in (32,) if quick else BATCHES:
            yield _batch(arch, B)
    if quick or device != "cpu":
        return
    for arch in ("cnn", "tdcnn"):
        yield _batch(arch, 32, trained)
    for arch in ARCHITECTURES:
        sizes = label_sizes(recorded, arch, SEGMENT_HOP)
        yield Workload("label", f"{arch}, {sizes['count']} utterances, {sizes['windows']} windows, hop 8", sizes)
    for arch in ARCHITECTURES:
        sizes = label_sizes(corpus, arch, CORPUS_HOP[arch])
        title = (
            f"{arch}, {corpus_name}: {sizes['count']} utterances, {sizes['windows']} windows, hop {CORPUS_HOP[arch]}"
        )
        yield Workload("label", title, sizes, least_rounds=1)


# --- growth ------------------------------------------------------------------------------------------------------


def growth(folder: Path, recorded: Path) -> Iterator[tuple[str, str, Workload]]:
    """What grows, along which axis, to what: (series, point, workload), to be timed on our own alone."""
    for arch in ("cnn", "lstm"):
        for hidden in (32, 128, 512, 2048):
            workload = Workload("train", f"{arch} hidden {hidden}", _network(arch, 32, hidden=hidden), tolerance=1e-3)
            yield f"{arch} training step, B 32, against hidden width", str(hidden), workload
    for arch in ARCHITECTURES:
        for windows in (1, 4, 16, 64):
            path = folder / f"{arch}-{windows}-windows.npz"
            workloads.record_one(path, recorded, arch, SEGMENT_HOP, windows)
            workload = Workload("label", f"{arch} {windows} windows", label_sizes(path, arch, SEGMENT_HOP, checked=1))
            yield f"{arch}, an utterance from samples to label, against its windows (hop 8)", str(windows), workload


def threaded() -> Iterator[Workload]:
    """What is timed with every number of threads, on our own alone."""
    for arch in ARCHITECTURES:
        yield _step(arch, 32)
    for arch in ARCHITECTURES:
        yield _batch(arch, 32)
