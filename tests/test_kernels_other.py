"""Dropout, the loss and the short-time Fourier transform: `kernels.cpu` against the truth (`operands`)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operands import KEYS, Numbers, absolute, assert_within, few_examples, magnitudes, numbers, special, wide

from kernels import cpu, reference

# --- dropout ---------------------------------------------------------------------------------------------------------


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


# --- loss, short-time Fourier transform ------------------------------------------------------------------------------


@few_examples
@given(
    numbers,
    st.integers(1, 40),
    st.integers(2, 9),
    st.sampled_from([1.0, 100.0, 1e30]),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_softmax_and_cross_entropy(make, B, K, magnitude, smoothing):
    logits, targets = make(B, K, magnitude=magnitude), make.rng.integers(0, K, B)
    loss, p = cpu.cross_entropy_forward(logits, targets, smoothing)
    true_loss, true_p = reference.cross_entropy_forward(*wide(logits), targets, smoothing)
    assert loss == pytest.approx(true_loss, rel=1e-5, abs=1e-6)
    for ours in (p, cpu.softmax(logits)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, true_p, rtol=1e-4, atol=1e-6)
    d = cpu.cross_entropy_backward(p, targets, smoothing)
    assert d.dtype == np.float32
    np.testing.assert_allclose(d, reference.cross_entropy_backward(true_p, targets, smoothing), atol=2e-6 / B)


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
