"""Operands for the tests of kernels: float32 numbers of every kind and layout, and the truth to compare results with.

The truth is `kernels.reference` in float64, from the same float32 numbers. A product may be wrong by 1e-5 of the sum of
|x| |w| behind the output in question, no more; that sum is the reference again, on absolute values. Sizes are drawn to
be odd in every sense that a vector kernel can stumble over.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from kernels import cpu, reference
from kernels.cpu import sparse
from kernels.reference import DEAD

NORMAL = float(np.finfo(np.float32).tiny)  # products below the smallest normal float32 may vanish

few_examples = settings(max_examples=40, derandomize=True, deadline=None)
magnitudes = st.sampled_from([1.0, 1.0, 1e30, 1e-30])


def sliced(x):
    """x as every second number of a wider array with not-a-number in between, so that a wrong stride shows."""
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype) if x.dtype.kind == "f" else np.repeat(x, 2, -1)
    wide[..., ::2] = x
    return wide[..., ::2]


def reversed_(x):
    everywhere = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[everywhere])[everywhere]


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "sliced": sliced,
    "reversed": reversed_,
}


@dataclass
class Numbers:
    """Float32 arrays of any shape: a layout in memory, a share of zeros, and a generator."""

    seed: int = 0
    layout: str = "contiguous"
    zeros: float = 0.0

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)

    def __call__(self, *shape, magnitude=1.0):
        x = self.rng.standard_normal(shape) * magnitude
        x[self.rng.random(shape) < self.zeros] = 0
        return LAYOUTS[self.layout](x.astype(np.float32))

    def places(self, *shape):
        """Any argmax, DEAD included."""
        return LAYOUTS[self.layout](self.rng.integers(0, DEAD, shape, np.uint8, endpoint=True))


numbers = st.builds(
    Numbers,
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(sorted(LAYOUTS)),
    zeros=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def absolute(*arrays):
    return [np.abs(a) for a in wide(*arrays)]


def assert_within(got, truth, behind, what="result", tolerance=1e-5):
    """|got - truth| <= tolerance * behind, where `behind` is the sum of the absolute values added up."""
    assert got.shape == truth.shape, what
    assert got.dtype == np.float32, what
    assert got.flags.c_contiguous, what
    excess = np.abs(got - truth) - (tolerance * behind + NORMAL)
    assert np.all(excess <= 0), f"{what}: too far from the truth by {np.nanmax(excess):.3g}, or not a number"


def assert_same_kind(got, naive, what="result"):
    """Finite exactly where the float32 reference is: overflow shows, and none is invented."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(naive), err_msg=what)


def special(make, *shape):
    """Numbers rounded so that many are equal, with infinities, not-a-number and both zeros strewn in."""
    x = np.rint(make(*shape))
    strewn = make.rng.random(shape) < 0.2
    x[strewn] = make.rng.choice(np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0]), np.count_nonzero(strewn))
    return x


# --- every operation, ready to be called -----------------------------------------------------------------------------

KEYS = [reference.dropout_key(*words) for words in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (12345, 3, 99999)]]


def calls(C=20, O=13, B=5, H=40):
    """name -> (function, operands, other arguments): every operation of the CPU rung that takes float32 operands."""
    make = Numbers(11)
    x, y, w = make(B, 7, 10, C), make(B, 7, 10, O), make(3, 3, C, O)
    dy, argmax = make(B, 3, 5, O), make.places(B, 3, 5, O)
    N, I, J = 19, 300, 37
    _, c, gates = reference.lstm_forward(make(9, 6, 4 * H), make(H, 4 * H))
    step = {"lr": 0.1, "momentum": 0.8}
    return {
        "conv3x3_forward": ({"x": x, "w": w, "b": make(O)}, {}),
        "conv3x3_backward": ({"dy": y, "x": x, "w": w}, {}),
        "conv_relu_pool_forward": ({"x": x, "w": w, "b": make(O)}, {}),
        "conv_relu_pool_backward": ({"dy": dy, "x": x, "w": w}, {"argmax": argmax}),
        "relu_forward": ({"x": x}, {}),
        "relu_backward": ({"dy": x, "y": x}, {}),
        "maxpool2x2_forward": ({"x": x}, {}),
        "maxpool2x2_backward": ({"dy": dy}, {"argmax": argmax, "x_shape": y.shape}),
        "dense_forward": ({"x": make(N, I), "w": make(I, J), "b": make(J)}, {}),
        "dense_backward_input": ({"dy": make(N, J), "w": make(I, J), "alive": make(N, I)}, {}),
        "dense_backward_weights": ({"x": make(N, I), "dy": make(N, J)}, {}),
        "dense_backward_bias": ({"dy": make(N, J)}, {}),
        "dense_update_weights": ({"x": make(N, I), "dy": make(N, J), "w": make(I, J), "v": make(I, J)}, step),
        "sgd_update": ({"w": make(I, J), "v": make(I, J), "dw": make(I, J)}, step),
        "dropout": ({"x": x}, {"rate": 0.25, "key": KEYS[0]}),
        "lstm_forward": ({"z": make(9, 6, 4 * H), "wh": make(H, 4 * H)}, {}),
        "lstm_inference": ({"x": make(9, 6, I), "wx": make(I, 4 * H), "wh": make(H, 4 * H), "b": make(4 * H)}, {}),
        "lstm_backward": ({"dh": make(9, 6, H), "gates": gates, "c": c, "wh": make(H, 4 * H)}, {}),
        "stft_magnitude_forward": ({"x": make(600)}, {"frame": 64, "hop": 20}),
        "stft_magnitude_backward": (
            {"dy": make(27, 33)},
            {"spectrum": make(27, 33) + 1j * make(27, 33), "frame": 64, "hop": 20, "samples": 600},
        ),
    }


IN_PLACE = {"dense_update_weights": ("w", "v"), "sgd_update": ("w", "v"), "matmul_update": ("w", "velocity")}
SPENT = {"lstm_forward": ("z",)}  # given away by the caller: may be overwritten, or not
SHARED = {"softmax", "cross_entropy_forward", "cross_entropy_backward", "dropout_key"}  # the reference's own code


def calls_from_lists():
    """The same for the products in `kernels.cpu.sparse`."""
    make, x = Numbers(12), Numbers(13, zeros=0.7)(sparse.DEPTH + 3, 2 * sparse.DEPTH + 5)
    (M, K), N, whole = x.shape, 2 * sparse.WIDTH + 7, 2 * sparse.WIDTH
    step = {"lr": 0.1, "momentum": 0.8}
    return {
        "matmul": ({"x": x, "w": make(K, N), "bias": make(N)}, {}),
        "matmul_update": ({"x": x, "dy": make(M, N), "w": make(K, N), "velocity": make(K, N)}, step),
        "matmul_transposed": ({"dy": make(M, whole), "w": make(K, whole), "x": x}, {}),
    }


def call(name, operands, others, module=cpu):
    """What the operation returns, and the operands it changes, as a list of arrays."""
    result = getattr(module, name)(**operands, **others)
    results = list(result) if isinstance(result, tuple) else [result] if result is not None else []
    return results + [operands[changed] for changed in IN_PLACE.get(name, ())]
