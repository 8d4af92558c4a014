"""At the edges of float32: extreme inputs, saturated outputs, very long sequences, empty batches."""

import numpy as np
import pytest

from kernels import cpu, host, reference
from npser.models import ARCHITECTURES, build_model
from npser.optim import SGD

CLASSES = 3


def small(arch, backend="cpu", **more):
    return build_model(arch, backend=backend, filters=4, hidden=8, bins=16, classes=CLASSES, seed=2, **more)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e3, 1e6])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_finite_and_right_at_extreme_inputs(arch, scale):
    """Against the same formulas in float64: within 1e-4 of the largest entry of each gradient."""
    model, exact = small(arch), small(arch, "reference", dtype="float64")
    exact.set_params({name: value.astype(np.float64) for name, value in model.params.items()})
    rng = np.random.default_rng(1)
    x = (scale * rng.standard_normal((5, model.input_frames, 16))).astype(np.float32)
    y = np.array([0, 1, 2, 0, 1])
    loss, gradients = model.loss_and_grads(x, y)
    true_loss, truth = exact.loss_and_grads(x.astype(np.float64), y)
    assert np.isfinite(loss)
    assert loss == pytest.approx(true_loss, rel=1e-4, abs=1e-5)
    for name, value in gradients.items():
        assert np.isfinite(value).all(), name
        # A saturated gate's derivative is right to 2.5e-7, which the layer's inputs multiply: huge ones come first.
        huge = name == "lstm1.wx" or (arch == "tdcnn" and name in ("conv1.w", "conv2.w"))
        gates = 0 if arch == "cnn" or scale < 1 else 1e-6 * scale if huge else 2e-6  # below 1 none is saturated
        largest = np.abs(truth[name]).max()
        np.testing.assert_allclose(value, truth[name], rtol=0, atol=1e-4 * largest + gates + 1e-37, err_msg=name)


@pytest.mark.parametrize("rung", [cpu, reference])
@pytest.mark.parametrize("gap", [0.0, 20.0, 88.0, 104.0, 1e4, 1e30])
def test_the_loss_of_a_saturated_softmax_is_exact(rung, gap):
    """-log p is the distance itself once the other exponential has vanished: no clipping, no infinity."""
    logits = np.array([[gap, 0.0], [0.0, gap]], np.float32)
    right, p = rung.cross_entropy_forward(logits, np.array([0, 1]))
    wrong, _ = rung.cross_entropy_forward(logits, np.array([1, 0]))
    log_sum = np.log1p(np.exp(-gap))  # float64
    assert right == pytest.approx(log_sum, rel=1e-6, abs=1e-7)
    assert wrong == pytest.approx(np.float32(gap) + log_sum, rel=1e-7)
    assert np.isfinite(p).all()
    for targets in ([0, 1], [1, 0]):
        d = rung.cross_entropy_backward(p, np.array(targets))
        assert np.isfinite(d).all()
        assert np.abs(d).max() <= 0.5


@pytest.mark.parametrize("rung", [cpu, reference])
def test_lstm_is_stable_over_ten_thousand_steps(rung):
    """States stay within their bounds (|h| < 1, |c| < steps) and gradients finite; both rungs go the same way."""
    T, H = 10_000, 8
    rng = np.random.default_rng(3)
    z = rng.standard_normal((2, T, 4 * H)).astype(np.float32)
    wh = (rng.standard_normal((H, 4 * H)) / np.sqrt(H)).astype(np.float32)
    exact_h, exact_c, exact_gates = reference.lstm_forward(z.astype(np.float64), wh.astype(np.float64))
    h, c, gates = rung.lstm_forward(z.copy(), wh)
    assert np.abs(h).max() <= 1
    assert np.abs(c).max() < 100
    np.testing.assert_allclose(h, exact_h, atol=1e-4)
    np.testing.assert_allclose(c, exact_c, atol=1e-3)
    dh = np.zeros_like(h)
    dh[:, -1] = 1
    dz = rung.lstm_backward(dh, gates, c, wh)
    assert np.isfinite(dz).all()
    truth = reference.lstm_backward(dh.astype(np.float64), exact_gates, exact_c, wh.astype(np.float64))
    np.testing.assert_allclose(dz, truth, atol=1e-4 * np.abs(truth).max())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_empty_batch_is_checked_as_any_other(arch):
    model = small(arch)
    assert model.predict_proba(np.zeros((0, model.input_frames, 16), np.float32)).shape == (0, CLASSES)
    for shape in ((0,), (0, 16), (0, model.input_frames, 15), (0, 3, 16), (0, model.input_frames, 16, 1)):
        with pytest.raises(ValueError, match=r"x has shape \(0"):
            model.predict_proba(np.zeros(shape, np.float32))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_not_a_number_is_neither_hidden_nor_learned(arch):
    """A loss that is not finite changes no parameter."""
    model, sgd = small(arch), SGD()
    x = np.ones((4, model.input_frames, 16), np.float32)
    y = np.array([0, 1, 2, 0])
    model.train_step(x, y, sgd)
    before = {name: value.copy() for name, value in model.params.items()}
    x[2, 5, 7] = np.nan
    assert np.isnan(model.train_step(x, y, sgd))
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, before[name])
    p = model.predict_proba(x)
    assert np.isnan(p[2]).all()
    assert np.isfinite(p[[0, 1, 3]]).all()


def test_clipping_survives_gradients_whose_squares_overflow():
    (short,) = host.shortened([np.full(4, 3e19, np.float32)], 1.0)
    np.testing.assert_allclose(short, 0.5)
