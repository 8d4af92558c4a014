"""Every operation of `kernels.reference` for the CPU: Numba, float32, vector micro-kernels in the hot loops.

simd.py is the vector language the kernels are written in; conv.py, conv_gradients.py, pool.py, dense.py, lstm.py,
lstm_gradients.py, elementwise.py, sgd.py and stft.py hold the operations, winograd.py, matmul.py and sparse.py the
algorithms behind them, each with its floor and how close it comes; strips.py cuts images, tools.py has the compiler's
settings and its cache.

Operands may have any strides (they are made contiguous); they must be float32, or a TypeError names the one that is
not (but for softmax and loss, which are the reference's own). What is changed in place (w and v of an update) must be
C-contiguous.

Where a module says how close it comes to its floor, it was measured on 2 cores of an Intel Xeon with AVX-512, with a
peak of 350 GFLOP/s of multiply-adds, 32 GB/s read and 50 GB/s read and written.
"""

from kernels.cpu.conv import conv3x3_forward, conv_relu_pool_forward
from kernels.cpu.conv_gradients import conv3x3_backward, conv_relu_pool_backward
from kernels.cpu.dense import (
    dense_backward_bias,
    dense_backward_input,
    dense_backward_weights,
    dense_forward,
    dense_update_weights,
)
from kernels.cpu.elementwise import (
    cross_entropy_backward,
    cross_entropy_forward,
    dropout,
    dropout_key,
    relu_backward,
    relu_forward,
    softmax,
)
from kernels.cpu.lstm import lstm_forward, lstm_inference
from kernels.cpu.lstm_gradients import lstm_backward
from kernels.cpu.pool import maxpool2x2_backward, maxpool2x2_forward
from kernels.cpu.sgd import sgd_update
from kernels.cpu.stft import stft_magnitude_backward, stft_magnitude_forward
from kernels.cpu.tools import cache_is_cold

__all__ = [
    "cache_is_cold",
    "conv3x3_backward",
    "conv3x3_forward",
    "conv_relu_pool_backward",
    "conv_relu_pool_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dense_backward_bias",
    "dense_backward_input",
    "dense_backward_weights",
    "dense_forward",
    "dense_update_weights",
    "dropout",
    "dropout_key",
    "lstm_backward",
    "lstm_forward",
    "lstm_inference",
    "maxpool2x2_backward",
    "maxpool2x2_forward",
    "relu_backward",
    "relu_forward",
    "sgd_update",
    "softmax",
    "stft_magnitude_backward",
    "stft_magnitude_forward",
]
