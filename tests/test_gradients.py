"""Gradients against central differences of the loss, in float64 on the reference rung; then the update they go into.

A layer is tested behind another one that learns (`Scale`), so that a wrong dx shows as well as a wrong dw, and in front
of a loss that weighs every output differently. Differences are taken at 1e-6 to 1e-5; ReLU and max-pooling have kinks,
and the seeds are such that no difference straddles one: it would fail its test.
"""

import numpy as np
import pytest

from kernels import cpu, reference
from npser.layers import (
    LSTM,
    AddChannel,
    ConvBlock,
    Dense,
    Dropout,
    Flatten,
    LastStep,
    Layer,
    ReLU,
    Sequential,
    TimeDistributed,
    Windows,
)
from npser.models import ARCHITECTURES, build_model
from npser.optim import SGD, Gradients

TOLERANCE = 1e-6


def differences(f, array, eps, entries=None):
    """Central differences of f() by the entries (flat indices, or all) of an array that f reads."""
    flat = array.reshape(-1)
    assert np.shares_memory(flat, array)
    entries = range(flat.size) if entries is None else entries
    result = []
    for i in entries:
        before = flat[i]
        flat[i] = before + eps
        above = f()
        flat[i] = before - eps
        below = f()
        flat[i] = before
        result.append((above - below) / (2 * eps))
    return np.array(result)


def assert_close(got, expected, what, tolerance=TOLERANCE):
    """max |got - expected| <= tolerance * max |expected|, and there is something to compare."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, what
    largest = np.abs(expected).max()
    assert largest > 0, f"{what}: the gradient is 0 everywhere, which tests nothing"
    error = np.abs(got - expected).max() / largest
    assert error <= tolerance, f"{what}: relative error {error:.2g}"


# --- operations --------------------------------------------------------------------------------------------------

k = reference


def rng_for(*words):
    return np.random.default_rng(words)


def check_operation(operands, forward, backward, eps=1e-5):
    """backward(dy, result of forward) -> {operand: gradient} against differences of sum(dy * y)."""
    y = forward()
    outputs = y[0] if isinstance(y, tuple) else y
    dy = rng_for(99).standard_normal(outputs.shape)

    def loss():
        y = forward()
        return float(np.sum(dy * (y[0] if isinstance(y, tuple) else y)))

    gradients = backward(dy, y)
    assert gradients.keys() == operands.keys()
    for name, gradient in gradients.items():
        expected = differences(loss, operands[name], eps).reshape(operands[name].shape)
        assert_close(gradient, expected, name)


@pytest.mark.parametrize("sizes", [(2, 5, 4, 3, 2), (1, 1, 1, 1, 1), (1, 4, 6, 1, 3)])
def test_conv3x3(sizes):
    B, T, F, C, O = sizes
    rng = rng_for(1, *sizes)
    x, w, b = rng.standard_normal((B, T, F, C)), rng.standard_normal((3, 3, C, O)), rng.standard_normal(O)
    check_operation(
        {"x": x, "w": w, "b": b},
        lambda: k.conv3x3_forward(x, w, b),
        lambda dy, y: dict(zip("xwb", k.conv3x3_backward(dy, x, w), strict=True)),
    )
    assert k.conv3x3_backward(k.conv3x3_forward(x, w, b), x, w, need_dx=False)[0] is None


def test_relu():
    x = rng_for(2).standard_normal((4, 5))
    check_operation({"x": x}, lambda: k.relu_forward(x), lambda dy, y: {"x": k.relu_backward(dy, y)})
    assert k.relu_backward(np.ones(2), np.zeros(2)).tolist() == [0, 0]  # at the kink


@pytest.mark.parametrize("sizes", [(2, 4, 6, 3), (1, 5, 7, 2)])
def test_maxpool2x2(sizes):
    x = rng_for(3, *sizes).standard_normal(sizes)
    check_operation(
        {"x": x},
        lambda: k.maxpool2x2_forward(x),
        lambda dy, y: {"x": k.maxpool2x2_backward(dy, y[1], x.shape)},
    )


def test_maxpool2x2_names_the_first_maximum_in_row_order():
    cells = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [1, 4, 4, 4], [0, 1, 1, 0], [5, 5, 5, 5], [0, 0, 7, 7]], float)
    y, argmax = k.maxpool2x2_forward(cells.reshape(6, 2, 2, 1))
    assert y.ravel().tolist() == [4, 4, 4, 1, 5, 7]
    assert argmax.ravel().tolist() == [3, 0, 1, 1, 0, 2]


@pytest.mark.parametrize("sizes", [(2, 4, 6, 3, 2), (1, 5, 7, 1, 3)])
def test_conv_relu_pool(sizes):
    B, T, F, C, O = sizes
    rng = rng_for(4, *sizes)
    x, w, b = rng.standard_normal((B, T, F, C)), rng.standard_normal((3, 3, C, O)), rng.standard_normal(O) - 3
    _, argmax = k.conv_relu_pool_forward(x, w, b)
    assert (argmax == k.DEAD).any()  # the case that only this operation has
    check_operation(
        {"x": x, "w": w, "b": b},
        lambda: k.conv_relu_pool_forward(x, w, b),
        lambda dy, y: dict(zip("xwb", k.conv_relu_pool_backward(dy, y[1], x, w), strict=True)),
        eps=1e-6,
    )


def test_dense():
    rng = rng_for(5)
    x, w, b = rng.standard_normal((4, 3)), rng.standard_normal((3, 5)), rng.standard_normal(5)
    check_operation(
        {"x": x, "w": w, "b": b},
        lambda: k.dense_forward(x, w, b),
        lambda dy, y: {
            "x": k.dense_backward_input(dy, w),
            "w": k.dense_backward_weights(x, dy),
            "b": k.dense_backward_bias(dy),
        },
    )


def test_dropout():
    x, key = rng_for(6).standard_normal((6, 7)), k.dropout_key(3, 1, 4)
    y = k.dropout(x, 0.4, key)
    assert 0 < np.count_nonzero(y) < y.size
    np.testing.assert_allclose(y[y != 0], x[y != 0] / 0.6)
    check_operation({"x": x}, lambda: k.dropout(x, 0.4, key), lambda dy, y: {"x": k.dropout(dy, 0.4, key)})


@pytest.mark.parametrize("sizes", [(3, 5, 4), (2, 1, 3), (1, 9, 1)])
def test_lstm(sizes):
    B, T, H = sizes
    rng = rng_for(7, *sizes)
    z, wh = rng.standard_normal((B, T, 4 * H)), rng.standard_normal((H, 4 * H))

    def backward(dy, results):
        h, c, gates = results
        dz = k.lstm_backward(dy, gates, c, wh)
        before = np.concatenate([np.zeros((B, 1, H)), h[:, :-1]], axis=1)
        return {"z": dz} | ({"wh": np.einsum("bti,btj->ij", before, dz)} if T > 1 else {})

    check_operation({"z": z} | ({"wh": wh} if T > 1 else {}), lambda: k.lstm_forward(z, wh), backward)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    logits, targets = rng_for(8).standard_normal((5, 4)), np.array([0, 3, 1, 3, 2])
    loss, p = k.cross_entropy_forward(logits, targets, smoothing)
    np.testing.assert_allclose(p, k.softmax(logits), rtol=1e-14)
    wanted = np.full(logits.shape, smoothing / 4)
    wanted[np.arange(5), targets] += 1 - smoothing
    assert loss == pytest.approx(-(wanted * np.log(p)).sum() / 5)

    def of_logits():
        return k.cross_entropy_forward(logits, targets, smoothing)[0]

    expected = differences(of_logits, logits, 1e-5).reshape(logits.shape)
    assert_close(k.cross_entropy_backward(p, targets, smoothing), expected, "logits")


def test_cross_entropy_of_saturated_logits():
    loss, p = k.cross_entropy_forward(np.array([[0.0, 800.0], [-2e4, 0.0]]), np.array([0, 1]))
    assert loss == 400  # the mean of 800 and 0; by way of p it would be infinite
    assert p.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(("samples", "frame", "hop"), [(40, 16, 8), (37, 10, 4), (16, 16, 8), (30, 8, 11)])
def test_stft_magnitude(samples, frame, hop):
    x = rng_for(9, samples).standard_normal(samples)
    check_operation(
        {"x": x},
        lambda: k.stft_magnitude_forward(x, frame, hop),
        lambda dy, y: {"x": k.stft_magnitude_backward(dy, y[1], frame, hop, samples)},
    )


# --- layers ------------------------------------------------------------------------------------------------------


class Scale(Layer):
    """y = x * s, a weight per element: its gradient is right only if the layer behind it returns the right dx."""

    def __init__(self, shape):
        self.params = {"front.s": rng_for(20).uniform(0.5, 1.5, shape)}

    def forward(self, x, n):
        self.x = x
        return x * self.params["front.s"]

    def backward(self, dy, sink, need_dx):
        s = self.params["front.s"]
        dx = dy * s
        sink.add(k, "front.s", s, (dy * self.x).sum(axis=0))
        return dx if need_dx else None


def conv(name="conv", channels=2, filters=3):
    rng = rng_for(21, channels)
    return ConvBlock(k, name, rng.standard_normal((3, 3, channels, filters)), rng.standard_normal(filters) - 1)


def dense(name="dense", inputs=6, outputs=4):
    rng = rng_for(22, inputs)
    return Dense(k, name, rng.standard_normal((inputs, outputs)), rng.standard_normal(outputs))


def recurrent(name="lstm", inputs=6, H=3):
    rng = rng_for(23, inputs)
    return LSTM(
        k, name, rng.standard_normal((inputs, 4 * H)), rng.standard_normal((H, 4 * H)), rng.standard_normal(4 * H)
    )


LAYERS = {
    "ConvBlock": (lambda: [conv()], (4, 6, 2)),
    "Dense": (lambda: [dense()], (6,)),
    "LSTM": (lambda: [recurrent()], (5, 6)),
    "stacked LSTM": (lambda: [recurrent(), recurrent("lstm2", 3, 2), LastStep(reference)], (4, 6)),
    "ReLU": (lambda: [ReLU(k)], (7,)),
    "Dropout": (lambda: [Dropout(k, 0.4, 5, 1)], (7,)),
    "AddChannel": (lambda: [AddChannel()], (3, 4)),
    "Flatten": (lambda: [Flatten()], (2, 3, 4)),
    "Flatten, Dense": (lambda: [Flatten(), dense(inputs=24)], (2, 3, 4)),
    "LastStep": (lambda: [LastStep(reference)], (4, 3)),
    "Windows, overlapping": (lambda: [Windows(reference, 4, 2, 3)], (8, 3)),
    "Windows, apart": (lambda: [Windows(reference, 2, 3, 2)], (5, 3)),
    "TimeDistributed": (lambda: [TimeDistributed(Sequential([AddChannel(), conv(channels=1), Flatten()]))], (2, 4, 6)),
    "TimeDistributed, nothing to learn": (lambda: [TimeDistributed(ReLU(k))], (2, 3)),
    "all of tdcnn": (
        lambda: [
            Windows(reference, 4, 2, 3),
            TimeDistributed(Sequential([AddChannel(), conv(channels=1), Dropout(k, 0.3, 5, 1), Flatten()])),
            recurrent(inputs=12),
            LastStep(reference),
            dense(inputs=3),
        ],
        (8, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    """Parameters of the layer, and through dx those of the one in front and the network's own input."""
    make, shape = LAYERS[name]
    layers = Sequential([Scale(shape), *make()])
    x = rng_for(24, len(shape)).standard_normal((3, *shape))
    n = 6  # a fixed update number, so that dropout is on, always with the same mask
    dy = rng_for(25).standard_normal(layers.forward(x, n).shape)
    sink = Gradients()
    dx = layers.backward(dy, sink, need_dx=True)
    assert sink.arrays.keys() == layers.params.keys()

    def loss():
        return float(np.sum(dy * layers.forward(x, n)))

    for parameter, value in {**layers.params, "x": x}.items():
        gradient = dx if parameter == "x" else sink.arrays[parameter]
        assert_close(gradient, differences(loss, value, 1e-6).reshape(value.shape), parameter)
    again = Gradients()
    layers.forward(x, n)
    assert layers.backward(dy, again, need_dx=False) is None  # and the rest stays the same
    for parameter, gradient in again.arrays.items():
        np.testing.assert_array_equal(gradient, sink.arrays[parameter])


def test_backward_stops_at_the_first_layer_that_learns():
    class MustNotRun(Layer):
        def forward(self, x, n):
            return x

        def backward(self, dy, sink, need_dx):
            raise AssertionError("nobody asked for this gradient")

    class Asked(Dense):
        def backward(self, dy, sink, need_dx):
            asked.append(need_dx)
            return super().backward(dy, sink, need_dx)

    asked = []
    a, b = dense("a"), dense("b", 4, 2)
    layers = Sequential([MustNotRun(), Asked(k, "a", *a.params.values()), Asked(k, "b", *b.params.values())])
    y = layers.forward(np.ones((2, 6)), None)
    layers.backward(y, Gradients(), need_dx=False)
    assert asked == [True, False]  # the second one's dx is the first one's dy


def test_dropout_is_off_without_an_update_number():
    x = np.ones((3, 4))
    assert Dropout(k, 0.5, 1, 1).forward(x, None) is x
    assert (Dropout(k, 0.5, 1, 1).forward(x, 0) != x).any()
    assert Dropout(k, 0.0, 1, 1).forward(x, 0) is x


# --- whole networks ----------------------------------------------------------------------------------------------

SMALL = {"filters": 3, "hidden": 5, "bins": 8, "classes": 3}
SAMPLED = 40  # entries of each parameter that are differentiated numerically, at most


def small(arch, backend="reference", dtype="float64", **settings):
    model = build_model(arch, backend=backend, dtype=dtype, seed=1, **{**SMALL, **settings})
    rng = rng_for(30)
    # biases off zero, so that theirs is not a special case
    model.set_params({n: v + 0.1 * rng.standard_normal(v.shape) for n, v in model.params.items()})
    return model


def batch(model, size=4, seed=31):
    rng = rng_for(seed)
    x = rng.standard_normal((size, model.input_frames, 8)).astype(model.dtype)
    return x, rng.integers(0, 3, size)


def sample(value, rng):
    return rng.permutation(value.size)[:SAMPLED]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_network(arch):
    model = small(arch)
    x, y = batch(model)
    loss, gradients = model.loss_and_grads(x, y)
    assert gradients.keys() == model.params.keys()

    def numeric_loss():
        return k.cross_entropy_forward(model._logits(x, None), y)[0]

    assert loss == numeric_loss()
    rng = rng_for(32)
    for name, value in model.params.items():
        assert gradients[name].shape == value.shape
        entries = sample(value, rng)
        expected = differences(numeric_loss, value, 1e-5, entries)
        assert_close(gradients[name].reshape(-1)[entries], expected, name)


# --- the update --------------------------------------------------------------------------------------------------

LR, MOMENTUM, DECAY, STEPS = 0.05, 0.8, 0.3, 4  # a decay that shows within four steps


def textbook(w, v, gradients, n):
    """Keras 1: lr_n = lr / (1 + decay n), v <- m v - lr_n g, w <- w + v; w and v in place."""
    for name, g in gradients.items():
        v[name] = MOMENTUM * v[name] - LR / (1 + DECAY * n) * g
        w[name] = w[name] + v[name]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("reference", "float64", 1e-12), ("cpu", "float32", 2e-5)])
def test_train_step_is_the_textbook_update(arch, backend, dtype, tolerance):
    """Several steps in a row: the velocities, and the decay of the learning rate, must be carried from one to the next.

    The gradients of each step come from `loss_and_grads` of another model, set to the textbook's own weights.
    """
    model, plain = small(arch, backend, dtype, dropout=0.0), small(arch, dropout=0.0)
    w = {name: value.astype(np.float64) for name, value in model.params.items()}
    v = {name: np.zeros(value.shape) for name, value in model.params.items()}
    first = {name: value.copy() for name, value in w.items()}
    sgd = SGD(LR, MOMENTUM, DECAY)
    for n in range(STEPS):
        assert sgd.updates == n
        x, y = batch(model, seed=40 + n)
        plain.set_params(w)
        true_loss, gradients = plain.loss_and_grads(x, y)
        textbook(w, v, gradients, n)
        assert model.train_step(x, y, sgd) == pytest.approx(true_loss, rel=tolerance)
        for name, value in model.params.items():
            assert_close(value - first[name], w[name] - first[name], f"{name} after step {n}", 10 * tolerance)
            assert_close(sgd.velocities[name], v[name], f"velocity of {name} after step {n}", 10 * tolerance)


@pytest.mark.parametrize("arch", ["cnn", "tdcnn"])  # lstm has no dropout
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("reference", "float64", 1e-6), ("cpu", "float32", 1e-4)])
def test_train_step_with_dropout(arch, backend, dtype, tolerance):
    """The first step, from velocity 0, is -lr times the gradient of the loss under this update's mask, differentiated
    numerically: forward and backward draw the same mask."""
    for n in (0, 3):
        model, numeric = small(arch, backend, dtype, dropout=0.5), small(arch, dropout=0.5)
        numeric.set_params(model.params)
        x, y = batch(model)
        sgd = SGD(LR, MOMENTUM, DECAY)
        sgd.updates = n

        def loss(n=n, numeric=numeric, x=x, y=y):
            return k.cross_entropy_forward(numeric._logits(x, n), y)[0]

        rng = rng_for(33)
        entries = {name: sample(value, rng) for name, value in model.params.items()}
        expected = {name: differences(loss, numeric.params[name], 1e-6, entries[name]) for name in entries}
        off = numeric.loss_and_grads(x, y)[0]
        assert abs(model.train_step(x, y, sgd) - off) > 1e-3  # dropout was on
        assert sgd.updates == n + 1
        for name, velocity in sgd.velocities.items():
            got = velocity.reshape(-1)[entries[name]] / -(LR / (1 + DECAY * n))
            assert_close(got, expected[name], f"{name} in update {n}", tolerance)


def test_dropout_masks_are_the_same_on_both_rungs():
    ours, reference_model = small("tdcnn", "cpu", "float32"), small("tdcnn", "reference", "float32")
    x, y = batch(ours)
    a, b = SGD(LR, MOMENTUM, DECAY), SGD(LR, MOMENTUM, DECAY)
    for _ in range(STEPS):
        assert ours.train_step(x, y, a) == pytest.approx(reference_model.train_step(x, y, b), rel=1e-4)


@pytest.mark.parametrize("rung", [reference, cpu], ids=["reference", "cpu"])
def test_sgd_fused_or_not(rung):
    """`add_product` is `add` of the product, with momentum and decay, over several updates."""
    rng = rng_for(50)
    fused, plain, gradients = SGD(LR, MOMENTUM, DECAY), SGD(LR, MOMENTUM, DECAY), Gradients()
    w = rng.standard_normal((37, 21)).astype(np.float32)
    fused_w, plain_w, exact = w.copy(), w.copy(), {"w": w.astype(np.float64)}
    v = {"w": np.zeros(w.shape)}
    for n in range(STEPS):
        x, dy = rng.standard_normal((9, 37)).astype(np.float32), rng.standard_normal((9, 21)).astype(np.float32)
        textbook(exact, v, {"w": x.astype(np.float64).T @ dy.astype(np.float64)}, n)
        fused.add_product(rung, "w", fused_w, x, dy)
        gradients.add_product(rung, "w", w, x, dy)
        plain.add(rung, "w", plain_w, gradients.arrays["w"])
        for sgd, value in ((fused, fused_w), (plain, plain_w)):
            assert_close(sgd.velocities["w"], v["w"], "v", 1e-6)
            assert_close(value, exact["w"], "w", 1e-6)
            sgd.updates += 1


def test_learning_rate_decays():
    sgd = SGD()
    assert (sgd.lr, sgd.momentum, sgd.decay) == (0.01, 0.8, 1e-6)  # the paper's
    assert sgd.rate == 0.01
    sgd.updates = 10**6
    assert sgd.rate == pytest.approx(0.005)


def test_nothing_is_updated_where_the_loss_is_not_finite():
    model = small("lstm", "cpu", "float32")
    x, y = batch(model)
    x[0, 0, 0] = np.nan
    before = {name: value.copy() for name, value in model.params.items()}
    sgd = SGD()
    assert np.isnan(model.train_step(x, y, sgd))
    assert sgd.updates == 0
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, before[name])
