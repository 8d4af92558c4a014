"""What is computed: kinds of workloads, their inputs, their operation counts, and when a result is right.

A workload is a kind and its sizes; both fit into a line of JSON, and every process makes the same inputs from them.
Shape letters are those of `kernels`, the sizes' own names are said at each kind below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.peers import Inputs, Sizes
from kernels.reference import Array

SEED = 2016
LR, MOMENTUM, DECAY, DROPOUT = 0.01, 0.8, 1e-6, 0.25  # of the paper
CHECK_LR, CHECK_BATCH, CHECK_STEPS = 0.05, 2, 2  # training steps that are compared; the rate makes changes visible
UPDATES = 150  # after so many, three of four features are 0, and it stays so
DISTINCT = 4  # different windows in a batch of `infer`: the reference computes only so many
CLASSES = 7
SAMPLED = 1 << 20  # of a larger result, so many entries are compared


@dataclass(frozen=True)
class Workload:
    """One row: kind and sizes say what is computed, the title is for the reader."""

    kind: str
    title: str
    sizes: Sizes
    tolerance: float = 1e-4  # largest difference from the reference, relative to its largest entry
    least_rounds: int = 3

    @property
    def operations(self) -> float:
        return _work(self.kind, self.sizes)[0]

    @property
    def traffic(self) -> float:
        """Bytes of all operands and results."""
        return _work(self.kind, self.sizes)[1]


# --- inputs ------------------------------------------------------------------------------------------------------


def _exact(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Random multiples of scale/64 in +-scale, scale a power of two.

    Sums of their products are exact in float32, in whatever order: all candidates find the same pixel of a pooling cell
    the largest, and a difference in a gradient is a fault, not a tie that was broken the other way.
    """
    return rng.integers(-64, 65, shape).astype(np.float32) * np.float32(scale / 64)


def inputs(kind: str, s: Sizes) -> Inputs:
    """The operands of a workload, in the layout of `kernels`, the same in every process."""
    rng = np.random.default_rng(SEED)

    def normal(*shape: int, scale: float = 1.0) -> Array:
        values = rng.standard_normal(shape, np.float32)
        values *= np.float32(scale)
        return values

    def targets(count: int, classes: int) -> Array:
        return np.asarray(rng.integers(0, classes, count))

    if kind in ("conv_block", "conv3x3"):
        B, T, F, C, O = (s[letter] for letter in "BTFCO")
        step = 2 if kind == "conv_block" else 1
        return {
            "x": _exact(rng, (B, T, F, C), 1.0),
            "w": _exact(rng, (3, 3, C, O), 0.125),
            "b": _exact(rng, (O,), 0.125),
            "dy": normal(B, T // step, F // step, O),
        }
    if kind == "maxpool":
        B, T, F, C = (s[letter] for letter in "BTFC")
        return {"x": normal(B, T, F, C), "dy": normal(B, T // 2, F // 2, C)}
    if kind in ("relu", "dropout", "sgd"):
        return {"x": normal(s["N"]), "dy": normal(s["N"]), "v": normal(s["N"], scale=0.01)}
    if kind in ("dense_forward", "dense_backward_input", "dense_update"):
        N, I, J = (s[letter] for letter in "NIJ")
        made = {"x": normal(N, I), "w": normal(I, J, scale=I**-0.5), "b": normal(J), "dy": normal(N, J)}
        return made | {"v": normal(I, J, scale=0.01)} if kind == "dense_update" else made
    if kind == "lstm":
        B, T, I, H = (s[letter] for letter in "BTIH")
        return {
            "x": normal(B, T, I),
            "wx": normal(I, 4 * H, scale=I**-0.5),
            "wh": normal(H, 4 * H, scale=H**-0.5),
            "b": normal(4 * H, scale=0.1),
            "dh": normal(B, T, H),
        }
    if kind == "cross_entropy":
        return {"x": normal(s["B"], s["K"]), "y": targets(s["B"], s["K"])}
    if kind == "stft":
        return {"x": normal(s["N"], scale=0.1)}
    if kind in ("train", "memory", "infer"):
        frames, bins = window_shape(s)
        distinct = min(s["B"], DISTINCT) if kind == "infer" else s["B"]
        windows = _recorded_windows(s)[:distinct, :frames] if "trained" in s else normal(distinct, frames, bins)
        x = np.resize(windows, (s["B"], frames, bins))
        made = {"x": x, "y": targets(s["B"], CLASSES)}
        return made if kind == "memory" else made | weights(s)
    if kind == "label":
        with np.load(s["samples"]) as file:
            ends = file["ends"][: s["count"]]
            return {"samples": file["samples"][: ends[-1]], "ends": ends, **weights(s)}
    raise ValueError(f"no such workload: {kind}")


def window_shape(s: Sizes) -> tuple[int, int]:
    """(frames, bins) of the network's input."""
    from npser.features import BINS
    from npser.models import input_frames

    bins = s["model"].get("bins", BINS)
    return input_frames(s["arch"], bins), bins


def weights(s: Sizes) -> Inputs:
    """The initial parameters of a network by name, as `npser.models` makes them from the seed.

    With a file of `train_convolutions` as s["trained"], those of the convolutions are the trained ones.
    """
    from npser.models import build_model

    return build_model(s["arch"], backend="reference", seed=SEED, **s["model"]).params | trained(s)


def trained(s: Sizes) -> Inputs:
    """The trained convolutions that a workload asks for; empty where it asks for none."""
    if "trained" not in s:
        return {}
    with np.load(s["trained"]) as file:
        return {name: file[name] for name in file if name != "windows"}


def _recorded_windows(s: Sizes) -> Array:
    with np.load(s["trained"]) as file:
        return np.asarray(file["windows"])


def train_convolutions(path: Path) -> None:
    """Write to `path` the convolutions of a cnn after UPDATES updates on the built-in corpus, and windows of it.

    What they hand on has more zeros than that of initial weights, and ours computes less where there are more.
    """
    from npser.corpus import open_corpus
    from npser.features import Standardisation, WindowSet
    from npser.frontend import read_frames
    from npser.models import build_model, input_frames
    from npser.optim import SGD

    corpus = open_corpus("demo")
    frames = read_frames(corpus, "cpu")
    windows = WindowSet(frames, Standardisation.of(frames), input_frames("tdcnn"), 16)
    targets = corpus.targets[windows.owner]
    model, sgd, rng = build_model("cnn", seed=SEED), SGD(), np.random.default_rng(SEED)
    for _ in range(UPDATES):
        batch = rng.integers(0, len(windows), 32)
        model.train_step(windows.batch(batch)[:, : model.input_frames], targets[batch], sgd)
    some = windows.batch(rng.integers(0, len(windows), 32))
    kept: dict[str, Any] = {name: value for name, value in model.params.items() if name.startswith("conv")}
    np.savez(path, windows=some, **kept)


def utterances(made: Inputs) -> list[Array]:
    """The samples of each utterance, of the inputs of a "label" workload."""
    return np.split(made["samples"], made["ends"][:-1])


def record(path: Path, corpus: str, count: int | None) -> None:
    """Write `count` utterances of a corpus (None: all) to `path`, for `inputs`."""
    from npser.corpus import open_corpus

    opened = open_corpus(corpus)
    every = 1 if count is None else max(1, len(opened.utterances) // count)
    samples = [opened.read(utterance) for utterance in opened.utterances[::every][:count]]
    np.savez(path, samples=np.concatenate(samples), ends=np.cumsum([len(x) for x in samples]))


def record_one(path: Path, recorded: Path, arch: str, hop: int, windows: int) -> None:
    """Write one utterance of exactly so many windows, made of the samples in the file `recorded`."""
    from npser.features import FRAME, HOP
    from npser.models import input_frames

    with np.load(recorded) as file:
        samples = np.resize(file["samples"], (input_frames(arch) + hop * (windows - 1) - 1) * HOP + FRAME)
    np.savez(path, samples=samples, ends=np.array([len(samples)]))


def label_sizes(path: Path, arch: str, hop: int, checked: int = 4) -> Sizes:
    """The sizes of a "label" workload: all utterances in `path`, of which the first `checked` are compared."""
    from npser.features import FRAME, HOP, window_count
    from npser.models import input_frames

    with np.load(path) as file:
        frames = [1 + (n - FRAME) // HOP for n in np.diff(file["ends"], prepend=0)]
    windows = sum(int(window_count(n, input_frames(arch), hop)) for n in frames)
    sizes = {"arch": arch, "samples": str(path), "count": len(frames), "windows": windows, "hop": hop}
    return sizes | {"checked": checked, "model": {}}


# --- counts ------------------------------------------------------------------------------------------------------


def _work(kind: str, s: Sizes) -> tuple[float, float]:
    """(operations counted densely, bytes of operands and results); (0, 0) where counting says nothing."""
    passes = 1 + (1 + bool(s.get("need_dx", True))) * bool(s.get("backward"))  # forward, dw, dx: as many operations
    if kind in ("conv_block", "conv3x3"):
        B, T, F, C, O = (s[letter] for letter in "BTFCO")
        y = B * T * F * O // (4 if kind == "conv_block" else 1)
        gradients = (y + (B * T * F * C if s.get("need_dx", True) else 0)) if s.get("backward") else 0
        return 2.0 * 9 * B * T * F * C * O * passes, 4.0 * (B * T * F * C + 9 * C * O + y + gradients)
    if kind == "maxpool":
        pixels = s["B"] * s["T"] * s["F"] * s["C"]
        return 0.0, 4.0 * 2.5 * pixels  # x, dx, a quarter of each for y and dy
    if kind in ("relu", "dropout", "sgd"):
        return 0.0, 4.0 * s["N"] * {"relu": 5, "dropout": 2, "sgd": 5}[kind]
    if kind in ("dense_forward", "dense_backward_input", "dense_update"):
        N, I, J = (s[letter] for letter in "NIJ")
        return 2.0 * N * I * J, 4.0 * (N * I + N * J + I * J * (4 if kind == "dense_update" else 1))
    if kind == "lstm":
        B, T, I, H = (s[letter] for letter in "BTIH")
        once = B * T * (I + H) + 4 * H * (I + H)
        return 2.0 * B * T * 4 * H * (I + H) * passes, 4.0 * once * (2 if s.get("backward") else 1)
    if kind == "cross_entropy":
        return 0.0, 4.0 * 2 * s["B"] * s["K"]
    if kind == "stft":
        return 0.0, 4.0 * (s["N"] + 129 * s["N"] // 128)  # half of 256 frequencies, one frame every 128 samples
    if kind == "train":
        forward, no_dx, parameters = _network(s)
        # The parameters are read forward and for dx; an update reads and writes them and their velocities.
        return s["B"] * (3 * forward - no_dx), 4.0 * 6 * parameters
    if kind in ("infer", "label"):
        forward, _, parameters = _network(s)
        return s["B" if kind == "infer" else "windows"] * forward, 4.0 * parameters
    return 0.0, 0.0


def _network(s: Sizes) -> tuple[float, float, int]:
    """(operations of a window forward, those among them that need no dx, weights)."""
    matrices = weight_matrices(s)
    operations = [2.0 * size * times for size, times in matrices]
    return sum(operations), operations[0], sum(size for size, _ in matrices)


def weight_matrices(s: Sizes) -> list[tuple[int, int]]:
    """(entries, how often one window applies it) of each weight matrix of a network, in the order of its layers."""
    from npser.models import WINDOWS

    arch = s["arch"]
    frames, bins = window_shape(s)
    filters = s["model"].get("filters", 32)
    H = s["model"].get("hidden", 128 if arch == "lstm" else 1024)
    convolutions = [(9 * filters, bins**2), (9 * filters**2, (bins // 2) ** 2)]
    features = (bins // 4) ** 2 * filters
    if arch == "cnn":
        return [*convolutions, (features * H, 1), (H * CLASSES, 1)]
    if arch == "lstm":
        square = (4 * H * H, frames)
        return [(4 * H * bins, frames), square, square, square, square, square, (H * CLASSES, 1)]
    square = (4 * H * H, WINDOWS)
    per_window = [(size, WINDOWS * times) for size, times in convolutions]
    return [*per_window, (4 * H * features, WINDOWS), square, square, square, (H * CLASSES, 1)]


# --- right or wrong ----------------------------------------------------------------------------------------------


def sampled(outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Outputs of more than SAMPLED entries cut down to so many, spread at random; with every shape."""
    kept: dict[str, NDArray[Any]] = {}
    for name, value in outputs.items():
        flat = np.ascontiguousarray(value).reshape(-1)
        if flat.size > SAMPLED:
            flat = flat[np.random.default_rng(SEED).integers(0, flat.size, SAMPLED)]
        kept[name] = flat
        kept[f"shape of {name}"] = np.array(value.shape)
    return kept


def difference(got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> tuple[float, str]:
    """The largest difference, relative to the largest entry of the expected output, and that output's name.

    Both as `sampled` gives them. Infinite where an output is missing, has another shape or is not finite, or where
    what is expected is not.
    """
    worst, where = 0.0, ""
    for name, value in expected.items():
        mine = got.get(name)
        if mine is None or mine.shape != value.shape or not (np.isfinite(mine).all() and np.isfinite(value).all()):
            return float("inf"), name
        largest = float(np.abs(value).max(initial=0)) or 1.0
        error = float(np.abs(mine.astype(np.float64) - value).max(initial=0)) / largest
        if error >= worst:
            worst, where = error, name
    return worst, where
