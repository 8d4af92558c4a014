"""The paper's three networks, cnn (Table II), lstm (Table III) and tdcnn (Table IV), and what can be done with one.

model = build_model("tdcnn", backend="cpu", seed=0)
loss = model.train_step(x, y, sgd)       # x (B, input_frames, 128), y (B,)
p = model.predict_proba(x)               # (B, 7)
"""

import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import kernels
from kernels.reference import Array
from npser import modelfile
from npser.corpus import PAPER_LABELS
from npser.errors import UserError
from npser.features import BINS, Standardisation
from npser.layers import (
    LSTM,
    AddChannel,
    ConvBlock,
    Dense,
    Dropout,
    Flatten,
    LastStep,
    Layer,
    ReLU,
    Sequential,
    SharedWindows,
    TimeDistributed,
    Windows,
)
from npser.optim import SGD, Gradients
from npser.recipes import ARCHITECTURES

WINDOWS, WINDOW_HOP = 4, 8  # tdcnn: windows in a sample, and frames from one to the next (paper, Fig. 5)


# --- the three networks ------------------------------------------------------------------------------------------


def _convolutions(make: "Maker", filters: int, dropout: float) -> Sequential:
    """(B, T, bins) -> (B, T/4 * bins/4 * filters): the two convolution blocks that cnn and tdcnn begin with."""
    return Sequential(
        [
            AddChannel(),
            make.conv("conv1", 1, filters),
            make.dropout(dropout),
            make.conv("conv2", filters, filters),
            make.dropout(dropout),
            Flatten(),
        ]
    )


def _cnn(make: "Maker", filters: int, hidden: int, bins: int, classes: int, dropout: float) -> list[Layer]:
    """Two convolution blocks, a dense layer of 1024, the classes: 33.57 million parameters."""
    features = (bins // 4) ** 2 * filters
    return [
        _convolutions(make, filters, dropout),
        make.dense("dense1", features, hidden, behind_relu=True),
        ReLU(make.k),
        make.dropout(dropout),
        make.dense("out", hidden, classes),
    ]


def _lstm(make: "Maker", filters: int, hidden: int, bins: int, classes: int, dropout: float) -> list[Layer]:
    """Three stacked LSTM layers of 128 over the frames, the classes from the last step: 0.396 million parameters."""
    return [
        make.lstm("lstm1", bins, hidden),
        make.lstm("lstm2", hidden, hidden),
        make.lstm("lstm3", hidden, hidden),
        LastStep(make.k),
        make.dense("out", hidden, classes),
    ]


def _tdcnn(make: "Maker", filters: int, hidden: int, bins: int, classes: int, dropout: float) -> list[Layer]:
    """The two blocks for each of 4 overlapping windows, then two LSTM layers of 1024: 146.8 million parameters."""
    features = (bins // 4) ** 2 * filters
    return [
        Windows(make.k, bins, WINDOW_HOP, WINDOWS),
        TimeDistributed(_convolutions(make, filters, dropout)),
        make.lstm("lstm1", features, hidden, behind_relu=True),
        make.lstm("lstm2", hidden, hidden),
        LastStep(make.k),
        make.dense("out", hidden, classes),
    ]


_NETWORKS = {"cnn": _cnn, "lstm": _lstm, "tdcnn": _tdcnn}
_HIDDEN = {"cnn": 1024, "lstm": 128, "tdcnn": 1024}


def input_frames(arch: str, bins: int = BINS) -> int:
    """How many frames a network reads at once: one window, or the four overlapping ones of tdcnn."""
    return bins + (WINDOWS - 1) * WINDOW_HOP if arch == "tdcnn" else bins


class Maker:
    """Makes layers with their initial weights (Keras 1: Glorot uniform, orthogonal recurrence, forget bias 1).

    Glorot and Bengio (2010): uniform in +-sqrt(6 / (fan_in + fan_out)). The four gates of an LSTM are four matrices,
    initialised each on its own.
    """

    def __init__(self, k: ModuleType, seed: int, dtype: DTypeLike) -> None:
        self.k, self.seed, self.dtype = k, seed, np.dtype(dtype)
        self.own = kernels.arrays(k).asarray  # initial values -> where the rung keeps its parameters
        self.rng = np.random.default_rng(seed)
        self.dropouts = 0

    def _glorot(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Array:
        limit = self.dtype.type(np.sqrt(6 / (fan_in + fan_out)))
        values: Array = self.rng.random(shape, dtype=self.dtype)  # type: ignore[arg-type]
        values *= 2 * limit
        values -= limit
        return values

    def _orthogonal(self, n: int) -> Array:
        """LAPACK's QR. The last digits depend on the processor: rounded to float32, those of one in millions do."""
        q, r = np.linalg.qr(self.rng.standard_normal((n, n)))
        return (q * np.sign(np.diag(r))).astype(self.dtype)

    def _recurrent(self, hidden: int) -> Array:
        return np.concatenate([self._orthogonal(hidden) for _ in range(4)], axis=1)

    def conv(self, name: str, channels: int, filters: int) -> ConvBlock:
        w = self._glorot((3, 3, channels, filters), 9 * channels, 9 * filters)
        return ConvBlock(self.k, name, self.own(w), self.own(np.zeros(filters, self.dtype)))

    def dense(self, name: str, inputs: int, outputs: int, behind_relu: bool = False) -> Dense:
        w = self._glorot((inputs, outputs), inputs, outputs)
        return Dense(self.k, name, self.own(w), self.own(np.zeros(outputs, self.dtype)), behind_relu)

    def lstm(self, name: str, inputs: int, hidden: int, behind_relu: bool = False) -> LSTM:
        wx = self._glorot((inputs, 4 * hidden), inputs, hidden)
        wh = self._recurrent(hidden)
        b = np.zeros(4 * hidden, self.dtype)
        b[hidden : 2 * hidden] = 1  # the forget gate starts open
        return LSTM(self.k, name, self.own(wx), self.own(wh), self.own(b), behind_relu)

    def dropout(self, rate: float) -> Dropout:
        self.dropouts += 1
        return Dropout(self.k, rate, self.seed, self.dropouts)


class _Blank(Maker):
    """Makes layers whose arrays have their shapes and no values yet: to count parameters, or to read them from a file.

    Memory that was not written to is not there: the largest network takes none until it is filled.
    """

    def _glorot(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Array:
        return np.empty(shape, self.dtype)

    def _recurrent(self, hidden: int) -> Array:
        return np.empty((hidden, 4 * hidden), self.dtype)


def parameter_count(arch: str, classes: int = 7) -> int:
    """The number of parameters of a network of the paper's size."""
    layers = _NETWORKS[arch](_Blank(kernels.rung("reference"), 0, "float32"), 32, _HIDDEN[arch], BINS, classes, 0.25)
    return sum(value.size for value in Sequential(layers).params.values())


# --- a network in use --------------------------------------------------------------------------------------------


class Model:
    """A network with its parameters. Make one with `build_model` or `load_model`.

    Calls take x (B, input_frames, bins) as it is, standardised already; `scale` is the standardisation that belongs to
    the parameters, kept for whoever reads a model file.
    """

    scale: Standardisation | None = None
    training: Mapping[str, Any] = {}  # settings of the training, for the model file
    cross_validation: Mapping[str, Any] | None = None  # the score measured with these settings, for the model file

    def __init__(self, arch: str, settings: Mapping[str, Any], backend: str, layers: Sequential) -> None:
        self.arch, self.settings, self.backend = arch, dict(settings), backend
        self.k = kernels.rung(backend)
        self.arrays = kernels.arrays(self.k)
        self.layers = layers
        self.input_frames = input_frames(arch, self.settings["bins"])
        self.window_frames = self.settings["bins"]  # tdcnn: of each of the windows in its input
        self.dtype = np.dtype(self.settings["dtype"])
        classes = self.settings["classes"]
        self.labels = PAPER_LABELS if classes == len(PAPER_LABELS) else tuple(f"class {n}" for n in range(classes))

    @property
    def params(self) -> dict[str, Array]:
        """The current values by name; on the cpu and the reference rung, the arrays are the model's own."""
        return {name: self.arrays.asnumpy(value) for name, value in self.layers.params.items()}

    def set_params(self, params: Mapping[str, NDArray[Any]]) -> None:
        """Copy the values into the parameters of these names; ValueError for an unknown name or a wrong shape."""
        for name, value in params.items():
            if name not in self.layers.params:
                raise ValueError(f"{self.arch} has no parameter {name!r}: it has {', '.join(self.layers.params)}")
            mine = self.layers.params[name]
            if mine.shape != value.shape:
                raise ValueError(f"{name} has shape {mine.shape}, not {value.shape}")
            self.arrays.assign(mine, value)

    def _check_shape(self, x: Array) -> None:
        if x.ndim != 3 or x.shape[1:] != (self.input_frames, self.settings["bins"]):
            raise ValueError(f"x has shape {x.shape}, not (B, {self.input_frames}, {self.settings['bins']})")

    def _check_batch(self, x: Array, y: NDArray[Any]) -> None:
        self._check_shape(x)
        classes = self.settings["classes"]
        if y.shape != x.shape[:1] or not len(y):
            raise ValueError(f"y has shape {y.shape}: one class for each of at least one sample, here ({len(x)},)")
        if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
            raise ValueError(f"y must hold classes, whole numbers from 0 to {classes - 1}")

    def _logits(self, x: Array, n: int | None) -> Array:
        self._check_shape(x)
        return self.layers.forward(self.arrays.asarray(x, self.dtype), n)

    def _inferred(self, x: Array) -> Array:
        return self.k.softmax(self.layers.infer(self.arrays.asarray(x, self.dtype)))

    def distinct_windows(self, starts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """tdcnn: where the distinct windows of samples that begin at `starts` (B,) begin, (D,), and `place` (B, 4)."""
        windows = starts[:, None] + WINDOW_HOP * np.arange(WINDOWS)
        distinct, place = np.unique(windows, return_inverse=True)
        return distinct, place.reshape(windows.shape)

    def shared(self, place: Array) -> Sequential:
        """tdcnn on the distinct windows of a batch, x (D, bins, bins): see `npser.layers.SharedWindows`."""
        _, blocks, first, *rest = self.layers.layers
        assert isinstance(blocks, TimeDistributed)
        assert isinstance(first, LSTM)
        return Sequential([SharedWindows(blocks.layer, first, place), *rest])

    def loss_and_grads(self, x: Array, y: NDArray[Any]) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy of the batch and the gradient of every parameter; dropout off.

        x (B, input_frames, bins), y (B,) classes. ValueError where they are not.
        """
        self._check_batch(x, y)
        sink, targets = Gradients(), self.arrays.asarray(y)
        loss, p = self.k.cross_entropy_forward(self._logits(x, None), targets)
        self.layers.backward(self.k.cross_entropy_backward(p, targets), sink, need_dx=False)
        return float(loss), {name: self.arrays.asnumpy(dw) for name, dw in sink.arrays.items()}

    def train_step(self, x: Array, y: NDArray[Any], sgd: SGD) -> float:
        """One update of the parameters, in place; returns the batch's loss before it. Operands: `loss_and_grads`."""
        self._check_batch(x, y)
        return float(self.train_batch(x, self.arrays.asarray(y), sgd)[0])

    def train_batch(
        self, x: Array, y: Array, sgd: SGD, place: Array | None = None, smoothing: float = 0.0
    ) -> tuple[Any, Array]:
        """`train_step` that also returns the probabilities (B, K), dropout on, of which the loss was computed.

        y, loss and probabilities are of the rung: on a GPU nothing here waits for them. Nothing is updated when the
        loss is known not to be finite. With `place` (tdcnn), x (D, bins, bins) are the distinct windows of the batch.
        smoothing: of the labels, see `kernels.reference.cross_entropy_forward`.
        """
        layers = self.layers if place is None else self.shared(place)
        logits = self._logits(x, sgd.updates) if place is None else layers.forward(x, sgd.updates)
        loss, p = self.k.cross_entropy_forward(logits, y, smoothing)
        if not self.arrays.diverged(loss):
            dlogits = self.k.cross_entropy_backward(p, y, smoothing)
            sgd.update(self.k, self.layers.params, lambda sink: layers.backward(dlogits, sink, need_dx=False))
        return loss, p

    def predict_proba(self, x: Array, batch_size: int = 32) -> Array:
        """Class probabilities (B, K) of B windows, computed in batches to bound the memory."""
        self._check_shape(x)  # of an empty batch, too
        parts = [self._inferred(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
        nothing = np.empty((0, self.settings["classes"]), self.dtype)
        return np.concatenate([nothing, *map(self.arrays.asnumpy, parts)])

    def save(self, path: str | os.PathLike[str], storage: str = "float32") -> None:
        """Write the model file, an npz of plain arrays; storage "float16" halves it. See `npser.modelfile`."""
        modelfile.write(self, path, storage)


def build_model(
    arch: str,
    *,
    backend: str = "cpu",
    seed: int = 0,
    filters: int = 32,
    hidden: int | None = None,
    bins: int = BINS,
    classes: int = 7,
    dropout: float = 0.25,
    dtype: str = "float32",
) -> Model:
    """A network with fresh weights, determined by the seed.

    arch: "cnn", "lstm" or "tdcnn"; backend: "cpu", "cuda" or "reference" (the rung of `kernels` that computes).
    filters, hidden (width of the dense or LSTM layers), bins and classes make smaller twins for tests; windows are
    bins x bins, and what an architecture lacks is ignored. dtype float64 is for the reference rung. ValueError for
    anything else; UserError where there is no GPU for "cuda", or too small a one.
    """
    settings = {
        "filters": filters,
        "hidden": _HIDDEN.get(arch) if hidden is None else hidden,
        "bins": bins,
        "classes": classes,
        "dropout": dropout,
        "dtype": dtype,
    }
    return _assembled(arch, backend, settings, Maker, seed)


def _assembled(arch: str, backend: str, settings: dict[str, Any], maker: type[Maker], seed: int = 0) -> Model:
    """A network whose layers `maker` makes; exceptions as in `build_model`."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}")
    sizes = {name: value for name, value in settings.items() if name != "dtype"}
    dtype = settings["dtype"]
    if dtype not in ("float32", "float64") or (dtype == "float64" and backend != "reference"):
        raise ValueError(f"dtype {dtype!r} with backend {backend!r}: float32, or float64 on the reference rung")
    least_bins = 1 if arch == "lstm" else 4  # two poolings leave a quarter
    if (
        min(sizes["filters"], sizes["hidden"], sizes["classes"]) < 1
        or sizes["bins"] < least_bins
        or not 0 <= sizes["dropout"] < 1
    ):
        raise ValueError(f"filters, hidden and classes must be >= 1, bins >= {least_bins}, dropout in [0, 1)")
    try:
        make = maker(kernels.rung(backend), seed, dtype)
        return Model(arch, settings, backend, Sequential(_NETWORKS[arch](make, **sizes)))
    except kernels.Unavailable as error:
        raise UserError(f"backend {backend}: {error}") from error


def blank_model(arch: str, backend: str, settings: Mapping[str, Any]) -> Model:
    """A network of these settings whose parameters have no values yet; exceptions as in `build_model`."""
    return _assembled(arch, backend, dict(settings), _Blank)


def load_model(path: str | os.PathLike[str], backend: str = "cpu") -> Model:
    """Read a file that `Model.save` wrote. UserError, naming the file, when it is no such file or is damaged."""
    return modelfile.read(path, backend, blank_model)
