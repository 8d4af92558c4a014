"""Numerical operations of convolutional and recurrent networks: one vocabulary, three rungs.

`kernels.reference` defines what every operation means (plain NumPy, any float type, written to be read),
`kernels.cpu` makes it fast (Numba, float32), `kernels.cuda` moves it to the GPU. A rung is a module; all rungs
offer the same names with the same arguments (but for the Fourier transform, which the GPU does not have), so a network
takes a rung as a parameter:

    k = kernels.rung("cpu")
    y, argmax = k.conv_relu_pool_forward(x, w, b)

Arrays are NumPy's, or the GPU's own: `kernels.arrays(k)` is the module that makes and moves them for a rung,
`kernels.host` or `kernels.cuda.arrays`, again with the same names.

| operation                    | forward                           | backward                                      |
| ---------------------------- | --------------------------------- | --------------------------------------------- |
| 3x3 convolution              | conv3x3_forward(x, w, b)          | conv3x3_backward(dy, x, w, need_dx)           |
| rectifier                    | relu_forward(x)                   | relu_backward(dy, y)                          |
| 2x2 max-pooling              | maxpool2x2_forward(x)             | maxpool2x2_backward(dy, argmax, x_shape)      |
| the three, fused             | conv_relu_pool_forward(x, w, b)   | conv_relu_pool_backward(dy, argmax, x, w, ..) |
| dense                        | dense_forward(x, w, b)            | dense_backward_input(dy, w, alive),           |
|                              |                                   | dense_backward_weights(x, dy),                |
|                              |                                   | dense_backward_bias(dy)                       |
| dense, with the update fused |                                   | dense_update_weights(x, dy, w, v, ..)         |
| dropout                      | dropout(x, rate, key)             | the same: dropout(dy, rate, key)              |
| LSTM over a sequence         | lstm_forward(z, wh)               | lstm_backward(dh, gates, c, wh)               |
| ... from inputs to states    | lstm_inference(x, wx, wh, b)      |                                               |
| softmax                      | softmax(logits)                   |                                               |
| cross-entropy                | cross_entropy_forward(logits, ..) | cross_entropy_backward(p, targets, ..)        |
| SGD with momentum            | sgd_update(w, v, dw, ..)          |                                               |
| short-time Fourier magnitude | stft_magnitude_forward(x, ..)     | stft_magnitude_backward(dy, spectrum, ..)     |

Shape letters, used everywhere: B batch, T time, F frequency, C channels in, O channels out, I inputs, J outputs,
H hidden units, K classes. Images are (B, T, F, C), channels last; sequences are (B, T, features). A gradient carries
the name of what it is the gradient of: `dx` is dLoss/dx and has x's shape.
"""

from importlib import import_module
from types import ModuleType

RUNGS = ("reference", "cpu", "cuda")


class Unavailable(Exception):
    """A rung cannot compute on this machine: one line that says why, and what to do."""


def rung(name: str) -> ModuleType:
    """The module that computes on rung `name`. Raises ValueError for an unknown name, Unavailable without a GPU."""
    if name not in RUNGS:
        raise ValueError(f"unknown rung {name!r}: choose one of {', '.join(RUNGS)}")
    module = import_module(f"kernels.{name}")
    if name == "cuda":
        module.require()
    return module


def arrays(k: ModuleType) -> ModuleType:
    """The module with the array functions of rung `k`: NumPy's arrays for the reference and the cpu, or the GPU's."""
    return import_module("kernels.cuda.arrays" if k.__name__ == "kernels.cuda" else "kernels.host")
