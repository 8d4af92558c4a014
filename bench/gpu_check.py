"""python bench/gpu_check.py: everything that only a GPU can tell, in one call.

Run it from the repository's root, on a machine with an NVIDIA GPU, numpy, numba, numba-cuda and scipy; nothing has to
be installed, soundfile and PyTorch may be missing. It checks `kernels.cuda` against the reference at the paper's sizes,
trains each network ten steps beside the cpu, times kernels and training steps (beside PyTorch, where it is there), and,
given recordings and a time budget, runs the paper's cross-validations. Every section runs in a process of its own, so
that a fault in one leaves the others alone; results are in OUT/gpu_check.json after each, run folders in OUT/<arch>.

    python bench/gpu_check.py --out results --wavs path/to/emodb --budget 1200

Exit status: 0 if everything agreed, 1 if something did not or a section failed, 2 without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARCHITECTURES = ("cnn", "lstm", "tdcnn")
BATCHES = (32, 128)
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3}  # largest difference, relative to the largest number
LOSS_TOLERANCE = 1e-4
Results = dict[str, Any]

# The paper's sizes at batch 32, and odd ones. Rows, inputs, outputs of dense products; B, T, H of LSTM layers; B, T, F,
# C, O of convolution blocks.
DENSE = {
    "cnn dense1": (32, 32768, 1024),
    "lstm inputs": (4096, 128, 512),
    "tdcnn lstm1": (128, 32768, 4096),
    "out": (32, 1024, 7),
    "odd": (77, 301, 203),
}
LSTMS = {"H 128": (32, 128, 128), "H 1024": (32, 4, 1024), "odd": (5, 7, 77)}
BLOCKS = {"block 1": (32, 128, 128, 1, 32), "block 2": (32, 64, 64, 32, 32), "odd": (3, 33, 47, 5, 37)}
ALONE = (4, 37, 41, 9, 13)  # a convolution without ReLU and pooling
PAPER_BATCH = 32
FRAMES = 100_000  # that the windows of timed training steps are cut out of
COPIED = 2**28  # numbers, to measure the memory's bandwidth by


# --- parity ------------------------------------------------------------------------------------------------------


def check_operations(precision: str) -> Results:
    """Every operation at the paper's sizes against the reference, which computes in float64 from the same numbers."""
    import numpy as np

    import kernels
    from kernels import reference
    from kernels.cuda import arrays

    k = kernels.rung("cuda")
    k.settings.precision = precision
    rng = np.random.default_rng(0)
    results: Results = {}

    def numbers(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    def wide(value: Any) -> Any:
        return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value

    def compare(title: str, name: str, *operands: Any, **options: Any) -> list[Any]:
        """Returns the device's results as NumPy arrays."""
        there = [arrays.asarray(value) if isinstance(value, np.ndarray) else value for value in operands]
        got = getattr(k, name)(*there, **options)
        truth = getattr(reference, name)(*map(wide, operands), **options)
        pairs = list(zip(_listed(got), _listed(truth), strict=True))
        ours = [None if g is None else arrays.asnumpy(g) for g, _ in pairs]
        error = 0.0
        for value, (_, true) in zip(ours, pairs, strict=True):
            if value is None:
                continue
            if value.dtype == np.uint8:  # places of maxima: two nearly equal ones may change places
                error = max(error, float(np.mean(value != true)))
            else:
                error = max(error, float(np.abs(value - true).max() / max(1e-30, np.abs(true).max())))
        results[f"{name} {title}"] = {"error": error, "agrees": bool(error <= TOLERANCE[precision])}
        return ours

    for title, (N, I, J) in DENSE.items():
        x, w, b, dy = numbers(N, I), numbers(I, J), numbers(J), numbers(N, J)
        compare(title, "dense_forward", x, w, b)
        compare(title, "dense_backward_input", dy, w)
        compare(title, "dense_backward_weights", x, dy)
        compare(title, "dense_backward_bias", dy)
        v = numbers(I, J)
        ours, true = [arrays.asarray(w), arrays.asarray(v)], [wide(w), wide(v)]
        k.dense_update_weights(arrays.asarray(x), arrays.asarray(dy), ours[0], ours[1], 0.01, 0.8)
        reference.dense_update_weights(wide(x), wide(dy), true[0], true[1], 0.01, 0.8)
        error = max(
            float(np.abs(arrays.asnumpy(a) - t).max() / np.abs(t).max()) for a, t in zip(ours, true, strict=True)
        )
        results[f"dense_update_weights {title}"] = {"error": error, "agrees": error <= TOLERANCE[precision]}
    for title, (B, T, H) in LSTMS.items():
        z, wh, dh = numbers(B, T, 4 * H), numbers(H, 4 * H) / np.float32(H**0.5), numbers(B, T, H)
        _, c, gates = compare(title, "lstm_forward", z, wh)
        compare(title, "lstm_backward", dh, gates, c, wh)
    if precision != "float32":
        return results  # nothing else depends on it
    for title, (B, T, F, C, O) in BLOCKS.items():
        x, w, b = numbers(B, T, F, C), numbers(3, 3, C, O), numbers(O)
        y, argmax = compare(title, "conv_relu_pool_forward", x, w, b)
        compare(title, "conv_relu_pool_backward", numbers(*y.shape), argmax, x, w)
    B, T, F, C, O = ALONE
    x, w = numbers(B, T, F, C), numbers(3, 3, C, O)
    compare("alone", "conv3x3_forward", x, w, numbers(O))
    compare("alone", "conv3x3_backward", numbers(B, T, F, O), x, w)
    compare("block 1", "dropout", numbers(*BLOCKS["block 2"][:4]), 0.25, reference.dropout_key(1, 2, 3))
    logits, targets = 3 * numbers(32, 7), rng.integers(0, 7, 32)
    compare("of 7 classes", "softmax", logits)
    _, p = compare("of 7 classes", "cross_entropy_forward", logits, targets)
    compare("of 7 classes", "cross_entropy_backward", p, targets)
    return results


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def check_losses(arch: str) -> Results:
    """Ten training steps at the paper's size and batch 32: the losses on the GPU beside those on the cpu."""
    import numpy as np

    from npser.models import build_model
    from npser.optim import SGD
    from npser.train import CLIP_NORM

    rng = np.random.default_rng(1)
    models = {backend: build_model(arch, backend=backend, seed=0) for backend in ("cuda", "cpu")}
    x = rng.standard_normal((PAPER_BATCH, models["cpu"].input_frames, 128), dtype=np.float32)
    y = rng.integers(0, 7, PAPER_BATCH)
    losses = {}
    for backend, model in models.items():
        sgd = SGD(clip_norm=CLIP_NORM[arch])
        losses[backend] = [model.train_step(x, y, sgd) for _ in range(10)]
    error = float(np.abs(np.subtract(losses["cuda"], losses["cpu"])).max())
    return {"losses": losses, "error": error, "agrees": error <= LOSS_TOLERANCE}


# --- timings -----------------------------------------------------------------------------------------------------


def milliseconds(work: Callable[[], object], repeats: int = 20) -> Results:
    """Median and least time of `work` on the device, by events around each call, and the time to launch it."""
    from kernels.cuda import device

    for _ in range(3):
        work()
    device.synchronise()
    events = [(device.cuda.event(timing=True), device.cuda.event(timing=True)) for _ in range(repeats)]
    started = time.perf_counter()
    for first, last in events:
        first.record(device.stream())
        work()
        last.record(device.stream())
    launched = time.perf_counter() - started
    device.synchronise()
    times = sorted(float(device.cuda.event_elapsed_time(first, last)) for first, last in events)
    return {"median": times[repeats // 2], "least": times[0], "launching": 1000 * launched / repeats}


def ceilings() -> Results:
    """What the device can do at most: float32 operations, as its clock has it; bytes, as a copy measures them."""
    from kernels.cuda import device

    gpu = device.cuda.get_current_device()
    flops = gpu.MULTIPROCESSOR_COUNT * 128 * 2 * gpu.CLOCK_RATE * 1e3  # 128 fused multiply-adds a cycle from 8.6 on
    if gpu.compute_capability == (8, 0):
        flops /= 2
    one, two = device.empty((COPIED,)), device.empty((COPIED,))
    copy = milliseconds(lambda: two.flat.copy_to_device(one.flat, stream=device.stream()))
    return {"float32_flops": flops, "bytes_per_second": 8 * COPIED / (copy["least"] / 1e3)}


def time_kernels(precision: str) -> Results:
    """Every operation of a training step, at batch 32 and 128, with its share of the device's ceilings."""
    import numpy as np

    import kernels
    from kernels.cuda import arrays, device, lstm

    k = kernels.rung("cuda")
    k.settings.precision = precision
    most = ceilings()
    rng = np.random.default_rng(0)
    results: Results = {"ceilings": most}

    def numbers(*shape: int) -> Any:
        return arrays.asarray(rng.standard_normal(shape, dtype=np.float32))

    def row(title: str, work: Callable[[], object], flops: float, moved: float) -> None:
        result = milliseconds(work)
        seconds = result["median"] / 1e3
        result["percent_of_float32"] = 100 * flops / seconds / most["float32_flops"]
        result["percent_of_bandwidth"] = 100 * moved / seconds / most["bytes_per_second"]
        results[title] = result

    # All weights on the chip take 200704 bytes; about 48 KB say that the driver granted no more: see kernels.cuda.lstm.
    results["shared memory of lstm_sequence"] = lstm._sequence_memory(lstm._lstm_sequence, 128)[2]
    tiny = device.empty((1,))
    row("an empty launch", lambda: k.relu_forward(tiny), 0, 0)
    for B in BATCHES:
        for title in ("cnn dense1", "lstm inputs", "tdcnn lstm1"):
            N, I, J = DENSE[title]
            N = N * B // PAPER_BATCH
            x, w, b, dy, v = numbers(N, I), numbers(I, J), numbers(J), numbers(N, J), arrays.zeros_like(numbers(I, J))
            flops, read = 2.0 * N * I * J, 4.0 * (N * I + I * J + N * J)
            row(f"{title} forward, batch {B}", partial(k.dense_forward, x, w, b), flops, read)
            row(f"{title} dx, batch {B}", partial(k.dense_backward_input, dy, w), flops, read)
            row(
                f"{title} dw + SGD, batch {B}",
                partial(k.dense_update_weights, x, dy, w, v, 1e-9, 0.8),
                flops, 4.0 * (N * I + N * J + 4 * I * J),
            )  # fmt: skip
            row(f"{title} db, batch {B}", partial(k.dense_backward_bias, dy), 1.0 * N * J, 4.0 * N * J)
        for title in ("H 128", "H 1024"):
            _, T, H = LSTMS[title]
            z, wh, dh = numbers(B, T, 4 * H), numbers(H, 4 * H), numbers(B, T, H)
            _, c, gates = k.lstm_forward(z, wh)
            flops = 8.0 * B * T * H * H
            row(f"lstm {title} forward, batch {B}", partial(k.lstm_forward, z, wh), flops, 40.0 * B * T * H)
            row(
                f"lstm {title} backward, batch {B}",
                partial(k.lstm_backward, dh, gates, c, wh),
                flops, 40.0 * B * T * H,
            )  # fmt: skip
        if precision != "float32":
            continue
        for title in ("block 1", "block 2"):
            _, T, _, C, O = BLOCKS[title]
            x, w, b = numbers(B, T, T, C), numbers(3, 3, C, O), numbers(O)
            y, argmax = k.conv_relu_pool_forward(x, w, b)
            flops, moved = 18.0 * B * T * T * C * O, 4.0 * x.size + 5.0 * y.size
            row(f"{title} forward, batch {B}", partial(k.conv_relu_pool_forward, x, w, b), flops, moved)
            for what, need in (("dw", False), ("dw + dx", True)):
                row(
                    f"{title} {what}, batch {B}",
                    partial(k.conv_relu_pool_backward, y, argmax, x, w, need),
                    flops * (1 + need), moved * (1 + need),
                )  # fmt: skip
        x = numbers(B, *BLOCKS["block 2"][1:4])
        row(f"dropout, batch {B}", partial(k.dropout, x, 0.25, (1, 2)), 0, 8.0 * x.size)
    return results


def time_steps(precision: str) -> Results:
    """A training step, its batch cut out of windows that are on the device, and inference."""
    import numpy as np

    import kernels
    from npser.models import build_model
    from npser.optim import SGD
    from npser.train import CLIP_NORM

    kernels.rung("cuda").settings.precision = precision
    rng = np.random.default_rng(0)
    results: Results = {}
    for arch in ARCHITECTURES:
        model = build_model(arch, backend="cuda", seed=0)
        k = model.arrays
        frames = k.asarray(rng.standard_normal((FRAMES, 128), dtype=np.float32))
        for B in BATCHES:
            sgd = SGD(clip_norm=CLIP_NORM[arch])
            starts, targets = k.asarray(rng.integers(0, FRAMES - 200, B)), k.asarray(rng.integers(0, 7, B))
            step = partial(_step, model, frames, starts, targets, sgd, k.Tally())
            results[f"{arch} training step, batch {B}"] = milliseconds(step)
            results[f"{arch} inference, batch {B}"] = milliseconds(partial(_infer, model, frames, starts))
    return results


def _step(model: Any, frames: Any, starts: Any, targets: Any, sgd: Any, tally: Any) -> None:
    """What the trainer does for a batch."""
    loss, p = model.train_batch(model.arrays.take_windows(frames, starts, model.input_frames), targets, sgd)
    tally.add(loss, p, targets)


def _infer(model: Any, frames: Any, starts: Any) -> Any:
    x = model.arrays.take_windows(frames, starts, model.input_frames)
    return model.k.softmax(model.layers.forward(x, None))


def time_torch(arch: str) -> Results:
    """The same training step in PyTorch: eager, as a CUDA graph and compiled; TF32 off and on."""
    try:
        import torch
    except ImportError:
        return {"skipped": "PyTorch is not installed"}
    from bench.peers.torch_gpu import make_step

    results: Results = {"version": torch.__version__}
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for B in BATCHES:
            for layout in ("channels first", "channels last") if arch != "lstm" else ("",):
                for how in ("eager", "graph", "compiled"):
                    title = f"{how}, TF32 {'on' if tf32 else 'off'}, batch {B}" + (f", {layout}" if layout else "")
                    try:
                        results[title] = _time_torch_step(torch, make_step(arch, B, layout == "channels last", how))
                    except Exception as error:  # a mode that PyTorch cannot do here is no fault of ours
                        results[title] = {"failed": " ".join(str(error).split())[:200]}
                    print(json.dumps({title: results[title]}), file=sys.stderr, flush=True)
    return results


def _time_torch_step(torch: Any, step: Callable[[], object], repeats: int = 20) -> Results:
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in events:
        first.record()
        step()
        last.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(last) for first, last in events)
    return {"median": times[repeats // 2], "least": times[0]}


# --- the sections, and how they are run --------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[], Results]] = {
    "parity float32": lambda: check_operations("float32"),
    "parity tf32": lambda: check_operations("tf32"),
    **{f"ten steps {arch}": partial(check_losses, arch) for arch in ARCHITECTURES},
    "steps float32": lambda: time_steps("float32"),
    "steps tf32": lambda: time_steps("tf32"),
    "kernels float32": lambda: time_kernels("float32"),
    "kernels tf32": lambda: time_kernels("tf32"),
    **{f"torch {arch}": partial(time_torch, arch) for arch in ARCHITECTURES},
}


def disagreements(results: Any, path: str = "") -> Iterator[str]:
    """The paths of everything that did not agree, or failed."""
    if not isinstance(results, dict):
        return
    if results.get("agrees") is False or "section failed" in results:
        yield path
    for key, value in results.items():
        yield from disagreements(value, f"{path} / {key}" if path else key)


def run_section(name: str, limit: float) -> Results:
    """One section in a process of its own."""
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--section", name]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"section failed": f"not finished after {limit:.0f} s"}
    seconds = round(time.monotonic() - started, 1)
    if done.returncode:
        return {"section failed": f"exit status {done.returncode}", "seconds": seconds}
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds}


def cross_validate(arch: str, wavs: Path, out: Path, precision: str, seconds: float) -> Results:
    """The paper's protocol, for at most so long; finished folds are in the run folder, and can be gone on from."""
    started = time.monotonic()
    command = [sys.executable, "-m", "npser.train", "--arch", arch, "--data", str(wavs), "--backend", "cuda"]
    command += ["--precision", precision, "--no-checkpoint", "--out", str(out / arch)]
    log = out / f"{arch}.log"
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            status: int | None = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, env=environment, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    folds = len(list((out / arch / "folds").glob("*.json")))
    taken = round(time.monotonic() - started, 1)
    return {"exit_status": status, "out_of_time": status is None, "finished_folds": folds, "seconds": taken}


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="bench/gpu_check.py", description=(__doc__ or "").split("\n\n")[1])
    p.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for results (default: gpu_check)")
    p.add_argument("--wavs", type=Path, help="folder of EMO-DB's recordings, for the cross-validations")
    p.add_argument("--budget", type=float, default=0.0, help="seconds for the cross-validations (default: 0, none)")
    p.add_argument("--precision", default="float32", choices=("float32", "tf32"), help="of the cross-validations")
    p.add_argument("--limit", type=float, default=240.0, help="seconds that a section may take (default: 240)")
    p.add_argument("--only", action="append", default=[], metavar="WORD", help="sections with this word in their name")
    p.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # what a process of its own is asked for
    options = p.parse_args(arguments)

    import kernels

    try:
        k = kernels.rung("cuda")
    except kernels.Unavailable as error:
        print(f"bench/gpu_check.py: {error}", file=sys.stderr)
        return 2
    if options.section:
        print(json.dumps(SECTIONS[options.section]()))
        return 0
    from npser.cli import machine, versions

    options.out.mkdir(parents=True, exist_ok=True)
    results: Results = {"gpu": k.device_name(), "machine": machine(), "versions": versions()}

    def keep(name: str, result: Results) -> None:
        results[name] = result
        (options.out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
        failed = list(disagreements({name: result}))
        print(f"{name}: {'; '.join(failed) if failed else 'done'} ({result.get('seconds')} s)", flush=True)

    for name in SECTIONS:
        if not options.only or any(word in name for word in options.only):
            keep(name, run_section(name, options.limit))
    end = time.monotonic() + options.budget
    for arch in ARCHITECTURES if options.wavs and options.budget > 0 else ():
        left = end - time.monotonic()
        if left > 5:
            keep(f"cross-validation {arch}", cross_validate(arch, options.wavs, options.out, options.precision, left))
    return 1 if list(disagreements(results)) else 0


if __name__ == "__main__":
    sys.exit(main())
