"""`kernels.cpu` against `kernels.reference`, which computes in float64 from the same float32 numbers: the truth.

A product may be wrong by 1e-5 of the sum of |x| |w| behind the output in question, no more; that sum is the reference
again, on absolute values. Sizes are drawn to be odd in every sense that a vector kernel can stumble over.

Run as a program ("python tests/test_parity.py start"), this file is the guarded run of `test_guard_pages`.
"""

import ctypes
import inspect
import mmap
import os
import pkgutil
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numba as nb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import cpu, reference
from kernels.cpu import lstm, sparse, strips, winograd
from kernels.cpu import matmul as matmul_module
from kernels.cpu.matmul import BLOCK, COLUMNS, ROWS, matmul, matmul_transposed
from kernels.reference import DEAD

HELPERS = {"reference": {"dropout_threshold", "hann"}, "cpu": {"cache_is_cold"}}  # public, but not operations
NORMAL = float(np.finfo(np.float32).tiny)  # products below the smallest normal float32 may vanish

few_examples = settings(max_examples=40, derandomize=True, deadline=None)
magnitudes = st.sampled_from([1.0, 1.0, 1e30, 1e-30])
threads_available = nb.config.NUMBA_NUM_THREADS

# --- numbers to compute with -------------------------------------------------------------------------------------


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
images = st.tuples(
    st.integers(1, 3),  # B
    st.one_of(
        st.integers(1, 9), st.integers(4 * strips.BAND, 4 * strips.BAND + 3)
    ),  # T: within a strip, or more than two
    st.one_of(st.integers(1, 9), st.integers(30, 40)),  # F
    st.one_of(st.just(1), st.integers(1, 12), st.integers(13, 40)),  # C: both sides of LANES
    st.integers(1, 40),  # O
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


# --- the rungs offer the same ------------------------------------------------------------------------------------


def operations(name):
    """The public functions of a rung that are operations."""
    module = kernels.rung(name)
    public = vars(module).items() if name == "reference" else ((n, getattr(module, n)) for n in module.__all__)
    return {n: f for n, f in public if inspect.isfunction(f) and not n.startswith("_") and n not in HELPERS[name]}


def test_rungs_offer_the_same_operations():
    assert operations("cpu").keys() == operations("reference").keys()
    for name, function in operations("cpu").items():
        parameters = [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]
        twin = inspect.signature(operations("reference")[name])
        assert parameters == [(p.name, p.default, p.kind) for p in twin.parameters.values()], name


def test_the_table_lists_every_operation():
    listed = set(re.findall(r"(\w+)\(", "\n".join(re.findall(r"^\|.*\|$", kernels.__doc__, re.MULTILINE))))
    assert listed | {"dropout_key"} == operations("reference").keys()


def test_unknown_rung():
    with pytest.raises(ValueError, match=r"'abacus'.*reference, cpu"):
        kernels.rung("abacus")


# --- convolution, ReLU, max-pooling ------------------------------------------------------------------------------


@few_examples
@given(numbers, images, magnitudes, magnitudes)
def test_conv3x3_forward(make, sizes, big_x, big_w):
    B, T, F, C, O = sizes
    x, w, b = make(B, T, F, C, magnitude=big_x), make(3, 3, C, O, magnitude=big_w), make(O)
    y = cpu.conv3x3_forward(x, w, b)
    if big_x * big_w > 1e38:
        with np.errstate(all="ignore"):
            return assert_same_kind(y, reference.conv3x3_forward(x, w, b))
    return assert_within(y, reference.conv3x3_forward(*wide(x, w, b)), reference.conv3x3_forward(*absolute(x, w, b)))


@few_examples
@given(numbers, images, magnitudes, magnitudes)
def test_conv3x3_backward(make, sizes, big_dy, big):
    B, T, F, C, O = sizes
    dy = make(B, T, F, O, magnitude=big_dy)
    x, w = make(B, T, F, C, magnitude=big), make(3, 3, C, O, magnitude=big)
    got = cpu.conv3x3_backward(dy, x, w)
    if big_dy * big > 1e38:
        with np.errstate(all="ignore"):
            naive = reference.conv3x3_backward(dy, x, w)
        for name, ours, theirs in zip(("dx", "dw"), got, naive, strict=False):  # db cannot overflow
            assert_same_kind(ours, theirs, name)
        return
    truth, behind = reference.conv3x3_backward(*wide(dy, x, w)), reference.conv3x3_backward(*absolute(dy, x, w))
    for name, *triple in zip(("dx", "dw", "db"), got, truth, behind, strict=True):
        assert_within(*triple, name)
    without = cpu.conv3x3_backward(dy, x, w, need_dx=False)
    assert without[0] is None
    np.testing.assert_array_equal(without[1], got[1])


@few_examples
@given(numbers, images, magnitudes, magnitudes)
def test_conv_relu_pool_forward(make, sizes, big_x, big_w):
    B, T, F, C, O = sizes
    x, w, b = make(B, T, F, C, magnitude=big_x), make(3, 3, C, O, magnitude=big_w), make(O)
    y, argmax = cpu.conv_relu_pool_forward(x, w, b)
    assert argmax.dtype == np.uint8
    assert argmax.shape == y.shape
    if big_x * big_w > 1e38:
        return None  # of infinities with both signs, the order of summation decides: see the next test
    cells = reference._cells(reference.conv3x3_forward(*wide(x, w, b)))
    behind = reference._cells(reference.conv3x3_forward(*absolute(x, w, b))).max(axis=-1)
    largest = np.maximum(cells.max(axis=-1), 0)
    assert_within(y, largest, behind)
    # The place named holds the maximum, or a value as large as far as float32 can tell; with a clear winner there is
    # only one such place. DEAD says the same of zero.
    named = np.take_along_axis(np.concatenate([cells, 0 * cells[..., :1]], -1), argmax[..., None].astype(int), -1)
    assert np.all(argmax <= DEAD)
    return assert_within(np.ascontiguousarray(named[..., 0], np.float32), largest, 2 * behind, "value at argmax")


@few_examples
@given(numbers, images)
def test_conv_relu_pool_forward_overflows_to_infinity(make, sizes):
    """Every other channel overflows upwards, to infinity; the rest downwards, which the ReLU makes 0."""
    B, T, F, C, O = sizes
    x, w, b = np.abs(make(B, T, F, C, magnitude=1e30)), np.abs(make(3, 3, C, O, magnitude=1e30)), make(O)
    w[..., ::2] *= -1
    with np.errstate(over="ignore"):
        expected = reference.conv_relu_pool_forward(x, w, b)
    for got, reference_result in zip(cpu.conv_relu_pool_forward(x, w, b), expected, strict=True):
        np.testing.assert_array_equal(got, reference_result)


@few_examples
@given(numbers, images)
def test_conv_relu_pool_forward_is_exact_on_integers(make, sizes):
    """Small integers leave no rounding, so that ties are ties: the first in row order wins, zero is dead."""
    B, T, F, C, O = sizes
    x, w, b = (np.clip(np.rint(a), -2, 2) for a in (make(B, T, F, C), make(3, 3, C, O), make(O)))
    if make.seed % 2:
        w[1:], w[:, 1:] = 0, 0  # one tap: sums of few small numbers, most cells tied
    for got, expected in zip(
        cpu.conv_relu_pool_forward(x, w, b), reference.conv_relu_pool_forward(x, w, b), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@few_examples
@given(numbers, images, magnitudes, magnitudes)
def test_conv_relu_pool_backward(make, sizes, big_dy, big):
    B, T, F, C, O = sizes
    dy, argmax = make(B, T // 2, F // 2, O, magnitude=big_dy), make.places(B, T // 2, F // 2, O)
    x, w = make(B, T, F, C, magnitude=big), make(3, 3, C, O, magnitude=big)
    got = cpu.conv_relu_pool_backward(dy, argmax, x, w)
    if big_dy * big > 1e38:
        with np.errstate(all="ignore"):
            naive = reference.conv_relu_pool_backward(dy, argmax, x, w)
        for name, ours, theirs in zip(("dx", "dw"), got, naive, strict=False):  # db cannot overflow
            assert_same_kind(ours, theirs, name)
        return
    (wide_dy, wide_x, wide_w), (abs_dy, abs_x, abs_w) = wide(dy, x, w), absolute(dy, x, w)
    truth = reference.conv_relu_pool_backward(wide_dy, argmax, wide_x, wide_w)
    behind = reference.conv_relu_pool_backward(abs_dy, argmax, abs_x, abs_w)
    for name, *triple in zip(("dx", "dw", "db"), got, truth, behind, strict=True):
        assert_within(*triple, name)
    without = cpu.conv_relu_pool_backward(dy, argmax, x, w, need_dx=False)
    assert without[0] is None
    np.testing.assert_array_equal(without[1], got[1])
    np.testing.assert_array_equal(without[2], got[2])


@pytest.mark.parametrize("channels", [1, 20])
def test_not_a_number_is_not_swallowed(channels):
    """max(nan, 0) and comparisons with nan are false, which is how a diverged network would look healthy."""
    make = Numbers(3)
    x, w, b = make(2, 8, 8, channels), make(3, 3, channels, 5), make(5)
    clean, argmax = cpu.conv_relu_pool_forward(x, w, b)
    for t in range(1, 3):  # all four places of a cell
        for f in range(1, 3):
            bad = x.copy()
            bad[1, t, f, channels - 1] = np.nan
            y, _ = cpu.conv_relu_pool_forward(bad, w, b)
            expected = reference.conv_relu_pool_forward(bad, w, b)[0]
            np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
            assert np.isnan(y[1, 0, 0]).all()
            np.testing.assert_array_equal(y[0], clean[0])
    dy = make(*clean.shape)
    live = tuple(np.argwhere(argmax != DEAD)[0])
    dy[live] = np.nan
    dx, dw, db = cpu.conv_relu_pool_backward(dy, argmax, x, w)
    assert np.isnan(dx).any()
    assert np.isnan(dw[..., live[3]]).any()
    assert np.isnan(db[live[3]])
    assert np.isfinite(dw[..., [o for o in range(5) if o != live[3]]]).all()
    dead = tuple(np.argwhere(argmax == DEAD)[0])
    dy[live], dy[dead] = 1, np.nan  # what the ReLU stopped reaches nothing
    for gradient in cpu.conv_relu_pool_backward(dy, argmax, x, w):
        assert np.isfinite(gradient).all()


def special(make, *shape):
    """Numbers rounded so that many are equal, with infinities, not-a-number and both zeros strewn in."""
    x = np.rint(make(*shape))
    strewn = make.rng.random(shape) < 0.2
    x[strewn] = make.rng.choice(np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0]), np.count_nonzero(strewn))
    return x


@few_examples
@given(numbers, images)
def test_relu_and_maxpool_are_exact(make, sizes):
    B, T, F, C, _ = sizes
    x, dy = special(make, B, T, F, C), special(make, B, T, F, C)
    y = cpu.relu_forward(x)
    np.testing.assert_array_equal(y, reference.relu_forward(x))
    np.testing.assert_array_equal(cpu.relu_backward(dy, y), reference.relu_backward(dy, y))
    pooled, argmax = cpu.maxpool2x2_forward(x)
    expected, expected_argmax = reference.maxpool2x2_forward(x)
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(argmax, expected_argmax)
    assert argmax.dtype == np.uint8
    dy, argmax = make(B, T // 2, F // 2, C), make.places(B, T // 2, F // 2, C)
    np.testing.assert_array_equal(
        cpu.maxpool2x2_backward(dy, argmax, x.shape), reference.maxpool2x2_backward(dy, argmax, x.shape)
    )


# --- Winograd's convolution ----------------------------------------------------------------------------------------


@few_examples
@given(numbers, images, st.integers(1, 3), magnitudes, magnitudes)
def test_winograd(make, sizes, vectors, big_x, big_w):
    """Its own bound: the largest number of the 4x4 patch counts for all of the cell's pixels, also beside a spike."""
    B, T, F, _, O = sizes
    if big_x * big_w > 1e38:
        return
    C = 16 * vectors
    x, w, b = make(B, T, F, C, magnitude=big_x), make(3, 3, C, O, magnitude=big_w), make(O, magnitude=big_x * big_w)
    x[:, T // 2, F // 2] *= np.float32(1000)
    x = np.ascontiguousarray(x)
    got = winograd.conv3x3_forward(x, np.ascontiguousarray(w), np.ascontiguousarray(b))
    truth = reference.conv3x3_forward(*wide(x, w, b))
    P, Q = -(-T // 2), -(-F // 2)
    padded = np.pad(np.abs(x).max(-1), ((0, 0), (1, 2 * P - T + 1), (1, 2 * Q - F + 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(1, 2))[:, ::2, ::2].max((-2, -1))
    largest = patches.repeat(2, 1).repeat(2, 2)[:, :T, :F, None].astype(np.float64)
    assert_within(got, truth, largest * np.abs(w).sum((0, 1, 2), dtype=np.float64) + np.abs(b), tolerance=1e-6)


def test_winograd_is_closer_to_the_truth_than_the_definition(monkeypatch):
    make = Numbers(5)
    x, w, b = make(2, 20, 20, 32), make(3, 3, 32, 32), make(32)
    truth = reference.conv3x3_forward(*wide(x, w, b))
    errors = {}
    for choice in "01":
        monkeypatch.setenv("NPSER_WINOGRAD", choice)
        errors[choice] = cpu.conv3x3_forward(x, w, b) - truth
    assert 0 < np.square(errors["1"]).mean() < np.square(errors["0"]).mean()
    assert np.abs(errors["1"]).max() < np.abs(errors["0"]).max()


@pytest.mark.parametrize("O", [7, 32])
def test_the_direct_kernels_stay_right(monkeypatch, O):
    """Where Winograd's would be taken: whole vectors of channels."""
    monkeypatch.setenv("NPSER_WINOGRAD", "0")
    make = Numbers(6)
    x, w, b = make(2, 11, 14, 32), make(3, 3, 32, O), make(O)
    behind = reference.conv3x3_forward(*absolute(x, w, b))
    assert_within(cpu.conv3x3_forward(x, w, b), reference.conv3x3_forward(*wide(x, w, b)), behind)
    y, argmax = cpu.conv_relu_pool_forward(x, w, b)
    truth, places = reference.conv_relu_pool_forward(*wide(x, w, b))
    np.testing.assert_allclose(y, truth, atol=1e-4)
    np.testing.assert_array_equal(argmax, places)


# --- dense -------------------------------------------------------------------------------------------------------

# 1, just below and above a tile, around a cache block, and more than one block
lengths = st.sampled_from([1, 2, ROWS - 1, ROWS + 1, COLUMNS - 1, COLUMNS + 1, 70, BLOCK - 1, BLOCK, 530, 1029])


@few_examples
@given(numbers, lengths, lengths, lengths, magnitudes, magnitudes)
def test_dense(make, N, I, J, big_x, big_w):
    x, w, b = make(N, I, magnitude=big_x), make(I, J, magnitude=big_w), make(J)
    dy, w_back = make(N, J, magnitude=big_w), make(I, J, magnitude=big_x)
    products = {
        "dense_forward": (x, w, b),
        "dense_backward_input": (dy, w_back),
        "dense_backward_weights": (x, dy),
    }
    for name, operands in products.items():
        got, operation = getattr(cpu, name)(*operands), getattr(reference, name)
        if big_x * big_w > 1e38:
            with np.errstate(all="ignore"):
                assert_same_kind(got, operation(*operands), name)
        else:
            assert_within(got, operation(*wide(*operands)), operation(*absolute(*operands)), name)
    assert_within(cpu.dense_backward_bias(dy), *(reference.dense_backward_bias(*f(dy)) for f in (wide, absolute)))


@few_examples
@given(numbers, lengths, lengths, lengths, st.booleans())
def test_matmul(make, M, K, N, turn_a):
    """The left side in any layout; the right side is contiguous, or it is `matmul_transposed` that multiplies."""
    a, b = make(K, M).T if turn_a else make(M, K), np.ascontiguousarray(make(K, N))
    bias = make(N)
    (a_, b_, bias_), (abs_a, abs_b, abs_bias) = wide(a, b, bias), absolute(a, b, bias)
    assert_within(matmul(a, b), a_ @ b_, abs_a @ abs_b)
    assert_within(matmul(a, b, bias), a_ @ b_ + bias_, abs_a @ abs_b + abs_bias)
    a, b_t = np.ascontiguousarray(a), np.ascontiguousarray(b.T)
    assert_within(matmul_transposed(a, b_t), a_ @ b_, abs_a @ abs_b)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("M", "N"), [(1, 272), (2, 272), (3, 272), (4, 272), (5, 4112), (8, 4112)])
def test_a_few_rows(M, N, bias):
    """Their product, for which b is not packed, has the bits of the same rows among many."""
    make = Numbers(M)
    a, b, c = make(9, 1024), make(1024, N), make(N) if bias else None
    assert b.size >= 1 << 18
    np.testing.assert_array_equal(matmul(a[:M], b, c), matmul(a, b, c)[:M])


listed_lengths = st.sampled_from([1, 2, sparse.DEPTH - 1, sparse.DEPTH + 1, sparse.WIDTH, sparse.WIDTH + 1, 700])


@few_examples
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.7, 1.0]), *3 * [listed_lengths])
def test_products_from_lists(seed, zeros, M, K, N):
    """Forward and update are the dense products' own bits; the input's gradient is right where it is wanted."""
    make, some = Numbers(seed), Numbers(seed + 1, zeros=zeros)
    x, w, b, dy = some(M, K), make(K, N), make(N), make(M, N)
    np.testing.assert_array_equal(sparse.matmul(x, w, b), matmul(x, w, b))
    ours, dense = (w.copy(), make(K, N)), (w.copy(), np.empty_like(w))
    dense[1][...] = ours[1]
    sparse.matmul_update(x, dy, *ours, 0.1, 0.8)
    matmul_module.matmul_update(x.T, dy, *dense, 0.1, 0.8)
    for got, expected in zip(ours, dense, strict=True):
        np.testing.assert_array_equal(got, expected)
    w, dy = make(K, sparse.WIDTH * (N % 3)), make(M, sparse.WIDTH * (N % 3))
    (dy_, w_), (abs_dy, abs_w) = wide(dy, w), absolute(dy, w)
    alive = x != 0
    assert_within(sparse.matmul_transposed(dy, w, x), alive * (dy_ @ w_.T), alive * (abs_dy @ abs_w.T))


@pytest.mark.parametrize(("zeros", "samples", "used"), [(0.7, 16, True), (0.3, 16, False), (0.7, 15, False)])
def test_lists_are_used_where_they_pay(monkeypatch, zeros, samples, used):
    calls = []
    for name in ("matmul", "matmul_update", "matmul_transposed"):
        product = getattr(sparse, name)
        monkeypatch.setattr(sparse, name, lambda *a, product=product, name=name: (calls.append(name), product(*a))[1])
    make, some = Numbers(3), Numbers(4, zeros=zeros)
    x, w, dy = some(samples, 1024), make(1024, 1024), make(samples, 1024)
    results = cpu.dense_forward(x, w, make(1024)), cpu.dense_backward_input(dy, w), cpu.dense_backward_input(dy, w, x)
    assert [r.shape for r in results] == [(samples, 1024)] * 3
    np.testing.assert_allclose(results[2][x != 0], results[1][x != 0], atol=1e-3)
    cpu.dense_update_weights(x, dy, w, np.zeros_like(w), 0.1, 0.8)
    assert calls == (["matmul", "matmul_transposed", "matmul_update"] if used else [])


@few_examples
@given(numbers, lengths, lengths, lengths, st.floats(0.001, 2), st.floats(0, 1))
def test_updates(make, N, I, J, lr, momentum):
    """sgd_update is right, and dense_update_weights is dense_backward_weights followed by sgd_update."""
    x, dy = make(N, I), make(N, J)
    w, v = np.ascontiguousarray(make(I, J)), np.ascontiguousarray(make(I, J))
    (w_, v_, x_, dy_), (abs_w, abs_v, abs_x, abs_dy) = wide(w, v, x, dy), absolute(w, v, x, dy)
    dw = cpu.dense_backward_weights(x, dy)
    once_w, once_v, twice_w, twice_v = w.copy(), v.copy(), w.copy(), v.copy()
    cpu.dense_update_weights(x, dy, once_w, once_v, lr, momentum)
    cpu.sgd_update(twice_w, twice_v, LAYOUTS[make.layout](dw), lr, momentum)
    reference.dense_update_weights(x_, dy_, w_, v_, lr, momentum)
    behind_v = momentum * abs_v + lr * (abs_x.T @ abs_dy)
    for got_w, got_v in ((once_w, once_v), (twice_w, twice_v)):
        assert_within(got_v, v_, behind_v, "v")
        assert_within(got_w, w_, behind_v + abs_w, "w")
    exact_w, exact_v = wide(w, v)
    reference.sgd_update(exact_w, exact_v, dw.astype(np.float64), lr, momentum)  # from the same float32 gradient
    assert_within(twice_v, exact_v, momentum * abs_v + lr * np.abs(dw), "v", tolerance=1e-6)


# --- LSTM --------------------------------------------------------------------------------------------------------


@few_examples
@given(
    numbers,
    st.integers(1, 11),
    st.one_of(st.integers(1, 3), st.integers(20, 40)),
    st.one_of(st.integers(1, 40), st.sampled_from([64, 96])),
    st.sampled_from([1.0, 30.0, 1e30, 1e-30]),
    st.sampled_from([1.0, 1e30, 1e-30]),
)
def test_lstm(make, B, T, H, big_z, big_dh):
    """tanh is a quotient of polynomials, about 2.4e-7 off; the recurrence carries that on, growing slowly."""
    z, wh = make(B, T, 4 * H, magnitude=big_z), make(H, 4 * H, magnitude=0.5 / np.sqrt(H))
    got = cpu.lstm_forward(z.copy(), wh)
    for name, ours, truth in zip(("h", "c", "gates"), got, reference.lstm_forward(*wide(z, wh)), strict=True):
        assert_within(ours, truth, 4 + T if name == "c" else 1, name, tolerance=2e-6)
    _, c, gates = got
    dh = make(B, T, H, magnitude=big_dh)
    truth = reference.lstm_backward(*wide(dh, gates, c, wh))
    behind = np.abs(truth).max(axis=(1, 2), keepdims=True) + np.abs(wide(dh)[0]).max()
    assert_within(cpu.lstm_backward(dh, LAYOUTS[make.layout](gates), c, wh), truth, behind, "dz")


@few_examples
@given(numbers, st.integers(1, 40), st.integers(1, 30), st.integers(1, 40), st.sampled_from([1, 5, 32, 40, 64]))
def test_lstm_inference(make, B, T, I, H):
    """Chunk by chunk in the cache, with the bits of one operation after the other."""
    x, wx, wh = make(B, T, I), make(I, 4 * H, magnitude=0.5 / np.sqrt(I)), make(H, 4 * H, magnitude=0.5 / np.sqrt(H))
    b = make(4 * H)
    h = cpu.lstm_inference(x, wx, wh, b)
    assert_within(h, reference.lstm_inference(*wide(x, wx, wh, b)), 1, "h", tolerance=2e-6)
    z = cpu.dense_forward(np.ascontiguousarray(x).reshape(B * T, I), wx, b).reshape(B, T, 4 * H)
    np.testing.assert_array_equal(h, cpu.lstm_forward(z, wh)[0])


@pytest.mark.parametrize("B", [1, 3, 8, 11])
def test_lstm_step_by_step(monkeypatch, B):
    """Wide layers take a product for each step, with the bits of the sums in one kernel."""
    make = Numbers(B)
    z, wh = make(B, 4, 4 * lstm.WIDE), make(lstm.WIDE, 4 * lstm.WIDE, magnitude=0.5 / np.sqrt(lstm.WIDE))
    dh = make(B, 4, lstm.WIDE)

    def both_ways():
        h, c, gates = cpu.lstm_forward(z.copy(), wh)
        return {"h": h, "c": c, "gates": gates, "dz": cpu.lstm_backward(dh, gates, c, wh)}

    by_steps = both_ways()
    monkeypatch.setattr(lstm, "WIDE", 10**9)
    monkeypatch.setattr(lstm, "matmul", None)  # not this way
    monkeypatch.setattr(lstm, "matmul_transposed", None)
    for name, other in both_ways().items():
        np.testing.assert_array_equal(by_steps[name], other, err_msg=name)


def test_lstm_hands_not_a_number_on():
    """Only to its own sequence, and only from its own step on; backwards, to the steps before."""
    make = Numbers(1)
    z, wh, dh = make(5, 6, 4 * 33), make(33, 4 * 33), make(5, 6, 33)
    clean_h, c, gates = cpu.lstm_forward(z.copy(), wh)
    clean_dz = cpu.lstm_backward(dh, gates, c, wh)
    z[2, 3, 7], dh[2, 3, 7] = np.nan, np.nan
    h, dz = cpu.lstm_forward(z, wh)[0], cpu.lstm_backward(dh, gates, c, wh)
    assert np.isnan(h[2, 3, 7])
    assert np.isnan(h[2, 4:]).all()
    assert np.isnan(dz[2, :3]).all()
    h[2, 3:], dz[2, :4] = clean_h[2, 3:], clean_dz[2, :4]
    np.testing.assert_array_equal(h, clean_h)
    np.testing.assert_array_equal(dz, clean_dz)


# --- dropout -----------------------------------------------------------------------------------------------------


@few_examples
@given(numbers, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.floats(0, 0.99), st.integers(0, 2**64 - 1))
def test_dropout_is_the_same_on_both_rungs(make, shape, rate, key):
    x, words = special(make, *shape), (key & 0xFFFFFFFF, key >> 32)
    y = cpu.dropout(x, rate, words)
    np.testing.assert_array_equal(y, reference.dropout(x, rate, words))
    assert y.dtype == np.float32


def test_dropout_keys():
    assert cpu.dropout_key is reference.dropout_key
    keys = {reference.dropout_key(s, l, n) for s in range(10) for l in range(10) for n in range(10)}
    assert len(keys) == 1000
    assert all(0 <= word < 2**32 for key in keys for word in key)
    assert reference.dropout_threshold(0.0) == 0
    assert reference.dropout_threshold(0.25) == 2**30
    assert reference.dropout_threshold(1 - 1e-12) == 2**32 - 1  # rounds up to 2^32, which would not fit


SAMPLES = 1 << 18
KEYS = [reference.dropout_key(*words) for words in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (12345, 3, 99999)]]


def kept(key, rate):
    return cpu.dropout(np.ones(SAMPLES, np.float32), rate, key) != 0


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_dropout_is_random(rate):
    """The share kept, and correlations at short distances and between keys, within 5 standard deviations."""
    masks = [kept(key, rate) - (1 - rate) for key in KEYS]
    spread = rate * (1 - rate)
    for mask in masks:
        assert abs(mask.mean()) < 5 * np.sqrt(spread / SAMPLES)
        for distance in (1, 2, 3, 4, 8, 16, 32, 64, 128, 1024, 32768):
            assert abs((mask[distance:] * mask[:-distance]).mean()) < 5 * spread / np.sqrt(SAMPLES - distance), distance
    for i, mask in enumerate(masks):
        for other in masks[:i]:  # consecutive steps, neighbouring layers, neighbouring seeds
            assert abs((mask * other).mean()) < 5 * spread / np.sqrt(SAMPLES)


def test_dropout_keeps_the_mean():
    x = Numbers(5)(SAMPLES) + np.float32(3)
    assert cpu.dropout(x, 0.25, KEYS[0]).mean() == pytest.approx(x.mean(), abs=0.02)
    np.testing.assert_array_equal(cpu.dropout(x, 0.0, KEYS[0]), x)


# --- loss, short-time Fourier transform --------------------------------------------------------------------------


@few_examples
@given(numbers, st.integers(1, 40), st.integers(2, 9), st.sampled_from([1.0, 100.0, 1e30]))
def test_softmax_and_cross_entropy(make, B, K, magnitude):
    logits, targets = make(B, K, magnitude=magnitude), make.rng.integers(0, K, B)
    loss, p = cpu.cross_entropy_forward(logits, targets)
    true_loss, true_p = reference.cross_entropy_forward(*wide(logits), targets)
    assert loss == pytest.approx(true_loss, rel=1e-5, abs=1e-6)
    for ours in (p, cpu.softmax(logits)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, true_p, rtol=1e-4, atol=1e-6)
    d = cpu.cross_entropy_backward(p, targets)
    assert d.dtype == np.float32
    np.testing.assert_allclose(d, reference.cross_entropy_backward(true_p, targets), atol=2e-6 / B)


@few_examples
@given(numbers, st.sampled_from([2, 16, 50, 256]), st.integers(1, 200), st.integers(0, 700), magnitudes)
def test_stft_magnitude(make, frame, hop, more, magnitude):
    x = make(frame + more, magnitude=magnitude)
    got, spectrum = cpu.stft_magnitude_forward(x, frame, hop)
    truth, _ = reference.stft_magnitude_forward(*wide(x), frame, hop)
    behind, _ = reference.stft_magnitude_forward(*absolute(x), frame, hop)  # bin 0: the sum of |hann x|
    assert_within(got, truth, np.broadcast_to(behind[:, :1], truth.shape))
    dy = make(*got.shape)
    dx = cpu.stft_magnitude_backward(dy, spectrum, frame, hop, len(x))
    true_dx = reference.stft_magnitude_backward(*wide(dy), spectrum.astype(np.complex128), frame, hop, len(x))
    assert_within(dx, true_dx, np.abs(dy).sum(), "dx")


# --- what all operations promise ---------------------------------------------------------------------------------


def calls(C=20, O=13, B=5):
    """name -> (function, operands, other arguments): every operation of the CPU rung that takes float32 operands."""
    make = Numbers(11)
    x, y, w = make(B, 7, 10, C), make(B, 7, 10, O), make(3, 3, C, O)
    dy, argmax = make(B, 3, 5, O), make.places(B, 3, 5, O)
    H, N, I, J = 40, 19, 300, 37
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


def test_calls_are_complete():
    assert calls().keys() | SHARED == operations("cpu").keys()


@pytest.mark.parametrize("name", calls())
def test_float64_is_refused_by_name(name):
    operands, others = calls()[name]
    for wrong in operands:
        with pytest.raises(TypeError, match=rf"\b{wrong} is float64"):
            call(name, {**operands, wrong: operands[wrong].astype(np.float64)}, others)


@pytest.mark.parametrize("name", calls())
def test_operands_stay_as_they_are(name):
    operands, others = calls()[name]
    before = {operand: value.copy() for operand, value in operands.items()}
    call(name, operands, others)
    for operand in operands.keys() - set(SPENT.get(name, ())):
        value = operands[operand]
        assert np.array_equal(value, before[operand]) == (operand not in IN_PLACE.get(name, ())), operand


@pytest.mark.parametrize("name", calls())
def test_threads_change_no_bit(name):
    if threads_available < 2:
        pytest.skip("Numba has one thread on this machine")
    results = {}
    try:
        for threads in (1, 2, threads_available):
            nb.set_num_threads(threads)
            results[threads] = [
                result for sizes in ({}, {"C": 3, "O": 33, "B": 18}) for result in call(name, *calls(**sizes)[name])
            ]
            if name.startswith("dense"):
                for product, (operands, others) in calls_from_lists().items():
                    results[threads] += call(product, operands, others, sparse)
    finally:
        nb.set_num_threads(threads_available)
    for threads, arrays in results.items():
        for ours, alone in zip(arrays, results[1], strict=True):
            np.testing.assert_array_equal(ours, alone, err_msg=f"{threads} threads")


@pytest.mark.parametrize("B", [1, 2, 3, 5, 8, 9])
def test_a_row_does_not_depend_on_its_neighbours(B):
    """Bit for bit: a prediction must not depend on the batch it was computed in."""
    make = Numbers(B)
    x, w, b = make(9, 6, 14, 20), make(3, 3, 20, 7), make(7)
    for ours, all_ in zip(cpu.conv_relu_pool_forward(x[:B], w, b), cpu.conv_relu_pool_forward(x, w, b), strict=True):
        np.testing.assert_array_equal(ours, all_[:B])
    x, w, b = make(9, 300), make(300, 40), make(40)
    np.testing.assert_array_equal(cpu.dense_forward(x[:B], w, b), cpu.dense_forward(x, w, b)[:B])
    z, wh = make(9, 7, 160), make(40, 160)
    for ours, all_ in zip(cpu.lstm_forward(z[:B].copy(), wh), cpu.lstm_forward(z, wh), strict=True):
        np.testing.assert_array_equal(ours, all_[:B])
    x, layer = make(9, 21, 30), (make(30, 160), wh, make(160))
    np.testing.assert_array_equal(cpu.lstm_inference(x[:B], *layer), cpu.lstm_inference(x, *layer)[:B])


def test_no_samples_at_all():
    make = Numbers()
    w, wh = make(3, 3, 2, 5), make(8, 32)
    y, argmax = cpu.conv_relu_pool_forward(make(0, 6, 8, 2), w, make(5))
    assert y.shape == argmax.shape == (0, 3, 4, 5)
    dx, dw, db = cpu.conv_relu_pool_backward(y, argmax, make(0, 6, 8, 2), w)
    assert dx.shape == (0, 6, 8, 2)
    assert not dw.any()
    assert not db.any()
    assert cpu.dense_forward(make(0, 3), make(3, 4), make(4)).shape == (0, 4)
    assert not cpu.dense_backward_weights(make(0, 3), make(0, 4)).any()
    h, c, gates = cpu.lstm_forward(make(0, 5, 32), wh)
    assert h.shape == (0, 5, 8)
    assert cpu.lstm_backward(h, gates, c, wh).shape == (0, 5, 32)
    assert cpu.lstm_inference(make(0, 5, 3), make(3, 32), wh, make(32)).shape == (0, 5, 8)
    assert cpu.dropout(make(0, 3), 0.5, KEYS[0]).shape == (0, 3)


# --- guard pages: nothing outside the operands is touched --------------------------------------------------------


class Guarded:
    """Stands for `numpy` in a module of kernels: every array it makes lies flush against an unreadable page.

    Vector kernels compute with addresses, and nothing checks them. So operands, scratch and results are put where one
    byte too far is a segmentation fault: at the end of their pages ("end") or at the beginning ("start").
    """

    def __init__(self, side):
        self.side = side
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.kept = []  # the pages stay: an array may outlive its last Python name

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=np.float64):
        dtype, shape = np.dtype(dtype), tuple(np.atleast_1d(shape))
        size, page = int(np.prod(shape)) * dtype.itemsize, mmap.PAGESIZE
        inner = -(-max(size, 1) // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for at in (address, address + page + inner):
            assert self.libc.mprotect(ctypes.c_void_p(at), page, 0) == 0
        first = page if self.side == "start" else page + inner - size
        self.kept.append(memory)
        array = np.frombuffer(memory, dtype, size // dtype.itemsize, first).reshape(shape)
        array.view(np.uint8)[...] = 0xFF  # not-a-number: what is read before it was written shows
        return array

    def zeros(self, shape, dtype=np.float64):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def copy(self, x):
        array = self.empty(x.shape, x.dtype)
        array[...] = x
        return array

    def empty_like(self, x):
        return self.empty(x.shape, x.dtype)

    def array(self, *args):
        return self.copy(np.array(*args))

    def pad(self, *args):
        return self.copy(np.pad(*args))

    def ascontiguousarray(self, x):
        return x if x.flags.c_contiguous else self.copy(np.ascontiguousarray(x))


GUARD_SIZES = [{}, {"C": 3, "O": 32, "B": 3}, {"C": 32, "O": 32, "B": 2}, {"C": 1, "O": 7, "B": 17}]
UNGUARDED = {"simd", "stft"}  # the language itself; no vector kernels
# Every module of the rung, the ones to come too; what is guarded in them are the operations that `calls` names.
GUARDED_MODULES = [
    module
    for found in pkgutil.iter_modules(cpu.__path__)
    if found.name not in UNGUARDED and hasattr(module := import_module(f"kernels.cpu.{found.name}"), "np")
]


def guarded_run(side):
    """Every operation with guarded operands, scratch and results; says how many agreed with an unguarded call."""
    guard = Guarded(side)
    agreed = 0
    todo = [(cpu, name, *rest) for sizes in GUARD_SIZES for name, rest in calls(**sizes).items()]
    todo += [(sparse, name, *rest) for name, rest in calls_from_lists().items()]
    todo.append((matmul_module, "matmul", {"a": Numbers(1)(3, 1024), "b": Numbers(2)(1024, 272)}, {}))  # of few rows
    for rung, name, operands, others in todo:
        if name.startswith("stft"):
            continue  # no vector kernels
        expected = [r.copy() for r in call(name, {o: v.copy() for o, v in operands.items()}, others, rung)]  # compiles
        for module in GUARDED_MODULES:
            module.np = guard
        try:
            argmax = {o: guard.copy(v) for o, v in others.items() if o == "argmax"}
            got = call(name, {o: guard.copy(v) for o, v in operands.items()}, {**others, **argmax}, rung)
        finally:
            for module in GUARDED_MODULES:
                module.np = np
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        agreed += 1
    print(f"{agreed} calls agreed")


def step_over_the_edge(side):
    """What a kernel does that reads one number too far."""
    array = Guarded(side).zeros(10, np.float32)
    ctypes.c_float.from_address(array.ctypes.data + (4 * array.size if side == "end" else -4)).value  # noqa: B018


def run_this_file(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[1])}
    command = [sys.executable, "-X", "faulthandler", __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's mprotect")


@linux_only
@pytest.mark.parametrize("side", ["start", "end"])
def test_guard_pages_guard(side):
    done = run_this_file(side, "step over")
    assert done.returncode == -signal.SIGSEGV, done.stderr


@linux_only
@pytest.mark.parametrize("side", ["start", "end"])
def test_guard_pages(side):
    done = run_this_file(side)
    assert done.returncode == 0, done.stderr
    products = len(calls_from_lists()) + 1
    assert done.stdout == f"{len(GUARD_SIZES) * (len(calls()) - 2) + products} calls agreed\n"  # without stft's two


if __name__ == "__main__":
    if "step over" in sys.argv:
        step_over_the_edge(sys.argv[1])
    else:
        guarded_run(sys.argv[1])
