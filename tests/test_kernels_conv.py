"""Convolution, ReLU and max-pooling: `kernels.cpu` against the truth (`operands`)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operands import (
    Numbers,
    absolute,
    assert_same_kind,
    assert_within,
    few_examples,
    magnitudes,
    numbers,
    special,
    wide,
)

from kernels import cpu, reference
from kernels.cpu import strips, winograd
from kernels.reference import DEAD

images = st.tuples(
    st.integers(1, 3),  # B
    # T: within a strip, or more than two
    st.one_of(st.integers(1, 9), st.integers(4 * strips.BAND, 4 * strips.BAND + 3)),
    st.one_of(st.integers(1, 9), st.integers(30, 40)),  # F
    # C: both sides of LANES, and whole vectors of many, which go by Winograd
    st.one_of(st.just(1), st.integers(1, 12), st.integers(13, 40), st.sampled_from([16, 32])),
    st.integers(1, 40),  # O
)


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
    y, argmax = cpu.conv_relu_pool_forward(x, w, b)
    if winograd.pays(C):  # its sums have both signs: what overflows may be NaN, and is never finite
        assert not np.isfinite(y[np.isinf(expected[0])]).any()
        assert (argmax[np.isnan(y)] != DEAD).all()
        return
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(argmax, expected[1])


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
            y, places = cpu.conv_relu_pool_forward(bad, w, b)
            assert (places[np.isnan(y)] != DEAD).all()  # nor is it on the way back
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


# --- Winograd's convolution ------------------------------------------------------------------------------------------


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
