"""Every operation of `kernels.reference` for an NVIDIA GPU: numba.cuda, float32, no cuDNN and no cuBLAS.

device.py is the GPU: arrays, stream, kernels; the only module that imports numba.cuda. launching.py keeps compiled
kernels and has the driver launch them. arrays.py holds what `kernels.host` does for NumPy. The operations lie in files
of the same names as the cpu's, with the same order of arguments, each with its floor: conv.py, conv_gradients.py,
pool.py, dense.py, lstm.py, lstm_gradients.py, elementwise.py and sgd.py; matmul.py and tf32.py multiply for them.

Operands are arrays on the device (`arrays.asarray`); a TypeError or ValueError names one that is not, or does not fit.
No operation waits for the device, and none adds up in an order that depends on timing: the same call gives the same
bits. The short-time Fourier transform is not here: what it gives is made once, by the cpu.

What the compiler makes of the larger kernels for compute capability 9.0 (H100, H200; numba-cuda 0.30, nvJitLink 13.5):
registers of a thread, and bytes of shared memory of a block that are fixed (the LSTM's sequence kernels take more at
launch). None spills registers to memory. `tests/test_cuda.py` keeps this table true.

| kernel                           | registers | shared bytes |
| -------------------------------- | --------: | -----------: |
| product_wide_plain_store         |       120 |        16896 |
| product_wide_plain_bias          |       128 |        16896 |
| product_wide_turned_b_store      |       121 |        16896 |
| product_wide_turned_a_store      |       122 |        16896 |
| product_wide_turned_a_update     |       120 |        16896 |
| product_flat_plain_store         |       111 |        10752 |
| product_flat_plain_bias          |        99 |        10752 |
| product_flat_turned_b_store      |        95 |        10752 |
| product_tensor_plain_store       |       124 |        17408 |
| product_tensor_plain_bias        |       124 |        17408 |
| product_tensor_turned_b_store    |       125 |        17408 |
| product_tensor_turned_a_store    |       126 |        17408 |
| product_tensor_turned_a_update   |       126 |        17408 |
| conv_relu_pool_1                 |       128 |         2448 |
| conv_relu_pool_many              |       126 |        19584 |
| conv3x3                          |       126 |        19584 |
| conv_relu_pool_dx                |       104 |        19584 |
| conv_relu_pool_dw_1              |        94 |        12688 |
| conv_relu_pool_dw_many           |       128 |        34112 |
| conv3x3_dw                       |       126 |        16832 |
| lstm_sequence                    |       126 |            0 |
| lstm_sequence_backward           |       122 |            0 |
| lstm_step                        |        83 |            0 |
| lstm_step_backward               |        53 |            0 |
"""

from kernels.cuda.conv import conv3x3_forward, conv_relu_pool_forward
from kernels.cuda.conv_gradients import conv3x3_backward, conv_relu_pool_backward
from kernels.cuda.dense import (
    dense_backward_bias,
    dense_backward_input,
    dense_backward_weights,
    dense_forward,
    dense_update_weights,
)
from kernels.cuda.device import (
    PRECISIONS,
    allow_simulator,
    cache_is_cold,
    device_name,
    keeps_kernels,
    require,
    settings,
    synchronise,
)
from kernels.cuda.elementwise import (
    cross_entropy_backward,
    cross_entropy_forward,
    dropout,
    dropout_key,
    relu_backward,
    relu_forward,
    softmax,
)
from kernels.cuda.lstm import lstm_forward, lstm_inference
from kernels.cuda.lstm_gradients import lstm_backward
from kernels.cuda.pool import maxpool2x2_backward, maxpool2x2_forward
from kernels.cuda.sgd import sgd_update

__all__ = [
    "PRECISIONS",
    "allow_simulator",
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
    "device_name",
    "dropout",
    "dropout_key",
    "keeps_kernels",
    "lstm_backward",
    "lstm_forward",
    "lstm_inference",
    "maxpool2x2_backward",
    "maxpool2x2_forward",
    "relu_backward",
    "relu_forward",
    "require",
    "settings",
    "sgd_update",
    "softmax",
    "synchronise",
]
