"""Layers: what each remembers from forward to backward, and which operations of `kernels` it calls.

Every layer is called forward and then backward, with the same batch:

    y = layer.forward(x, n)                    n: the number of this update, which dropout draws its mask by;
                                               None switches dropout off
    dx = layer.backward(dy, sink, need_dx)     hands the gradients of its parameters to the sink (`npser.optim`);
                                               dx is None where the caller has no use for it

or asked for its answer alone, with dropout off, which may be quicker where nothing is kept for a backward:

    y = layer.infer(x)

`params` holds the layer's own arrays under their full names ("conv1.w"). An update changes them in place, so dx is
computed before the sink is called. `k` is the rung of `kernels` that computes; numbers are moved by the functions of
`kernels.arrays(k)`, because the arrays may be on a GPU. Shape letters are those of `kernels`.
"""

from types import ModuleType

import kernels
from kernels.reference import Array
from npser.optim import Sink


class Layer:
    """A layer without parameters; subclasses say what forward and backward do."""

    params: dict[str, Array]

    def __init__(self) -> None:
        self.params = {}

    def forward(self, x: Array, n: int | None) -> Array:
        raise NotImplementedError

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        raise NotImplementedError

    def infer(self, x: Array) -> Array:
        return self.forward(x, None)


# --- layers that compute -----------------------------------------------------------------------------------------


class ConvBlock(Layer):
    """3x3 convolution + bias + ReLU + 2x2 max-pooling in one operation (paper, Fig. 2)."""

    def __init__(self, k: ModuleType, name: str, w: Array, b: Array) -> None:
        self.k, self.name = k, name
        self.params = {f"{name}.w": w, f"{name}.b": b}

    def forward(self, x: Array, n: int | None) -> Array:
        w, b = self.params.values()
        y, self.argmax = self.k.conv_relu_pool_forward(x, w, b)
        self.x = x
        return y

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        (name_w, w), (name_b, b) = self.params.items()
        dx, dw, db = self.k.conv_relu_pool_backward(dy, self.argmax, self.x, w, need_dx)
        sink.add(self.k, name_w, w, dw)
        sink.add(self.k, name_b, b, db)
        return dx


class Dense(Layer):
    """Fully connected: y = x w + b. behind_relu: ReLU (or dropout) made x, and takes no gradient where x is 0."""

    def __init__(self, k: ModuleType, name: str, w: Array, b: Array, behind_relu: bool = False) -> None:
        self.k, self.name, self.behind_relu = k, name, behind_relu
        self.params = {f"{name}.w": w, f"{name}.b": b}

    def forward(self, x: Array, n: int | None) -> Array:
        w, b = self.params.values()
        self.x = x
        return self.k.dense_forward(x, w, b)

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        (name_w, w), (name_b, b) = self.params.items()
        dx = self.k.dense_backward_input(dy, w, self.x if self.behind_relu else None) if need_dx else None
        sink.add_product(self.k, name_w, w, self.x, dy)
        sink.add(self.k, name_b, b, self.k.dense_backward_bias(dy))
        return dx


class LSTM(Layer):
    """A sequence of inputs to a sequence of hidden states: (B, T, I) -> (B, T, H). behind_relu: as for `Dense`."""

    def __init__(self, k: ModuleType, name: str, wx: Array, wh: Array, b: Array, behind_relu: bool = False) -> None:
        self.k, self.arrays, self.name, self.behind_relu = k, kernels.arrays(k), name, behind_relu
        self.params = {f"{name}.wx": wx, f"{name}.wh": wh, f"{name}.b": b}

    def forward(self, x: Array, n: int | None) -> Array:
        B, T, I = x.shape
        return self.recur(self.project(x.reshape(B * T, I)).reshape(B, T, -1))

    def infer(self, x: Array) -> Array:
        return self.k.lstm_inference(x, *self.params.values())

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        B, T, _ = dy.shape
        dx = self.project_backward(self.recur_backward(dy, sink), sink, need_dx)
        return dx.reshape(B, T, -1) if dx is not None else None

    def project(self, x: Array) -> Array:
        """What the inputs add to the gates, of all time steps at once: (rows, I) -> (rows, 4H)."""
        wx, _, b = self.params.values()
        self.x = x
        return self.k.dense_forward(x, wx, b)

    def recur(self, z: Array) -> Array:
        """The walk through time: (B, T, 4H) from `project` -> (B, T, H)."""
        _, wh, _ = self.params.values()
        self.h, self.c, self.gates = self.k.lstm_forward(z, wh)
        return self.h

    def recur_backward(self, dy: Array, sink: Sink) -> Array:
        """Back through time: (B, T, H) -> (B*T, 4H), the gradient of what `project` gave."""
        _, (name_wh, wh), (name_b, b) = self.params.items()
        B, T, H = dy.shape
        dz = self.k.lstm_backward(dy, self.gates, self.c, wh).reshape(B * T, 4 * H)
        sink.add_product(self.k, name_wh, wh, self.arrays.step_before(self.h).reshape(B * T, H), dz)
        sink.add(self.k, name_b, b, self.k.dense_backward_bias(dz))
        return dz

    def project_backward(self, dz: Array, sink: Sink, need_dx: bool) -> Array | None:
        """(rows, 4H) -> (rows, I)."""
        name_wx, wx = next(iter(self.params.items()))
        dx = self.k.dense_backward_input(dz, wx, self.x if self.behind_relu else None) if need_dx else None
        sink.add_product(self.k, name_wx, wx, self.x, dz)
        return dx


class ReLU(Layer):
    """y = max(x, 0)."""

    def __init__(self, k: ModuleType) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Array, n: int | None) -> Array:
        self.y = self.k.relu_forward(x)
        return self.y

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        return self.k.relu_backward(dy, self.y) if need_dx else None


class Dropout(Layer):
    """Inverted dropout, its mask a function of (model seed, layer number, update, element); nothing is stored."""

    def __init__(self, k: ModuleType, rate: float, seed: int, number: int) -> None:
        super().__init__()
        self.k, self.rate, self.seed, self.number = k, rate, seed, number

    def _mask(self, x: Array) -> Array:
        if self.n is None or self.rate == 0:
            return x
        return self.k.dropout(x, self.rate, self.k.dropout_key(self.seed, self.number, self.n))

    def forward(self, x: Array, n: int | None) -> Array:
        self.n = n
        return self._mask(x)

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        return self._mask(dy) if need_dx else None


# --- layers that arrange -----------------------------------------------------------------------------------------


class AddChannel(Layer):
    """(B, T, F) -> (B, T, F, 1): a spectrogram as an image with one channel."""

    def forward(self, x: Array, n: int | None) -> Array:
        return x.reshape(*x.shape, 1)

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        return dy.reshape(dy.shape[:-1])


class Flatten(Layer):
    """(B, T, F, C) -> (B, T*F*C), in this order."""

    def forward(self, x: Array, n: int | None) -> Array:
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        return dy.reshape(self.shape)


class LastStep(Layer):
    """(B, T, H) -> (B, H): what a recurrent network says after the last time step."""

    def __init__(self, k: ModuleType) -> None:
        super().__init__()
        self.arrays = kernels.arrays(k)

    def forward(self, x: Array, n: int | None) -> Array:
        self.steps = x.shape[1]
        return self.arrays.last_step_forward(x)

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        return self.arrays.last_step_backward(dy, self.steps)


class Windows(Layer):
    """(B, frames + (count-1)*hop, F) -> (B, count, frames, F): overlapping windows of one sample (paper, Fig. 5)."""

    def __init__(self, k: ModuleType, frames: int, hop: int, count: int) -> None:
        super().__init__()
        self.arrays, self.frames, self.hop, self.count = kernels.arrays(k), frames, hop, count

    def forward(self, x: Array, n: int | None) -> Array:
        self.total = x.shape[1]
        return self.arrays.windows_forward(x, self.frames, self.hop, self.count)

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        return self.arrays.windows_backward(dy, self.total, self.hop)


class Sequential(Layer):
    """Layers one after the other. Backward stops at the first layer that learns, unless dx is asked for."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.params = {name: value for layer in layers for name, value in layer.params.items()}
        self.first = next((i for i, layer in enumerate(layers) if layer.params), len(layers))

    def forward(self, x: Array, n: int | None) -> Array:
        for layer in self.layers:
            x = layer.forward(x, n)
        return x

    def infer(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.infer(x)
        return x

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        gradient: Array | None = dy
        for i in reversed(range(0 if need_dx else self.first, len(self.layers))):
            assert gradient is not None
            gradient = self.layers[i].backward(gradient, sink, need_dx or i > self.first)
        return gradient


class TimeDistributed(Layer):
    """The same layer, with the same weights, for each of the W windows of a sample: (B, W, ...) -> (B, W, ...)."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.params = layer.params

    def forward(self, x: Array, n: int | None) -> Array:
        self.leading = x.shape[:2]
        y = self.layer.forward(x.reshape(-1, *x.shape[2:]), n)
        return y.reshape(*self.leading, *y.shape[1:])

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        dx = self.layer.backward(dy.reshape(-1, *dy.shape[2:]), sink, need_dx)
        return dx.reshape(*self.leading, *dx.shape[1:]) if dx is not None else None


class SharedWindows(Layer):
    """Windows, TimeDistributed(blocks) and the LSTM behind them, where samples of a batch have windows in common.

    x (D, frames, F) are the distinct windows, place (B, T) says which of them a sample reads at every step. A window
    passes the blocks and the LSTM's input weights once, with one dropout mask, and its gradient is the sum of what the
    samples send back: the gradient of the batch is that of windows computed one by one, under the same masks.
    """

    def __init__(self, blocks: Layer, lstm: LSTM, place: Array) -> None:
        self.blocks, self.lstm, self.place = blocks, lstm, place
        self.params = blocks.params | lstm.params

    def forward(self, x: Array, n: int | None) -> Array:
        z = self.lstm.project(self.blocks.forward(x, n))
        return self.lstm.recur(self.lstm.arrays.take_rows(z, self.place))

    def backward(self, dy: Array, sink: Sink, need_dx: bool) -> Array | None:
        dz = self.lstm.recur_backward(dy, sink)
        dz = self.lstm.arrays.add_rows(dz, self.place, len(self.lstm.x))
        dx = self.lstm.project_backward(dz, sink, need_dx=True)
        assert dx is not None
        return self.blocks.backward(dx, sink, need_dx)
