"""LSTM: `kernels.cpu` against the truth (`operands`)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operands import LAYOUTS, Numbers, assert_within, few_examples, numbers, wide

from kernels import cpu, reference
from kernels.cpu import lstm, lstm_gradients


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
    monkeypatch.setattr(lstm_gradients, "matmul_transposed", None)
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


def test_lstm_leaves_what_is_read_only_as_it_is():
    """The gates take the place of z, and it is written through its address: nothing else would notice."""
    make = Numbers(2)
    z, wh = make(2, 3, 4 * 32), make(32, 4 * 32)
    fixed = np.frombuffer(z.tobytes(), np.float32).reshape(z.shape)
    got, expected = cpu.lstm_forward(fixed, wh), cpu.lstm_forward(z.copy(), wh)
    np.testing.assert_array_equal(fixed, z)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
