"""`kernels.cuda` against the reference and the cpu, in Numba's simulator. Run by test_cuda.py in a process of its own:

    NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda_simulated.py

Every thread is a Python thread here, so tiles and sizes are tiny; sizes are odd, and cross the edges of the tiles.
"""

import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import kernels
from bench import workloads
from kernels import host, reference
from kernels.cuda import allow_simulator, arrays, conv, device, lstm, lstm_gradients, matmul
from kernels.reference import DEAD
from npser import inference
from npser.errors import RunFailed, UserError
from npser.features import Standardisation, WindowSet
from npser.models import build_model, load_model
from npser.optim import SGD
from npser.predict import Input, segments
from npser.progress import Progress
from npser.train import main as train
from npser.trainer import Checkpoint, Task, evaluate, fit, train_epochs

assert device.SIMULATED, "run with NUMBA_ENABLE_CUDASIM=1"
allow_simulator()
cuda = kernels.rung("cuda")
rng = np.random.default_rng(0)
# The simulator polls its threads; with Python's usual 5 ms between two of them this would take minutes.
sys.setswitchinterval(1e-4)


def numbers(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def on_device(value):
    return arrays.asarray(value) if isinstance(value, np.ndarray) else value


def wide(value):
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def as_list(result):
    return list(result) if isinstance(result, tuple) else [result]


def agree(name, *operands, module=reference, rung=cuda, **options):
    """The operation on the device, in float32, against the reference in float64 of the same numbers."""
    got = as_list(getattr(rung, name)(*map(on_device, operands), **options))
    truth = as_list(getattr(module, name)(*map(wide, operands), **options))
    assert len(got) == len(truth)
    for ours, theirs in zip(got, truth, strict=True):
        if theirs is None:
            assert ours is None
            continue
        value = arrays.asnumpy(ours)
        assert value.shape == np.shape(theirs)
        if value.dtype == np.uint8:
            np.testing.assert_array_equal(value, theirs)
        else:
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, theirs, rtol=1e-5, atol=1e-5)
    return got


# --- the rungs offer the same ------------------------------------------------------------------------------------


def test_same_operations_and_arguments():
    """In files of the same names; all but the short-time Fourier transform, which is said to be missing."""
    beside = {"PRECISIONS", "allow_simulator", "cache_is_cold", "device_name", "keeps_kernels", "require", "settings"}
    beside |= {"synchronise"}
    ours = {name: getattr(cuda, name) for name in cuda.__all__ if name not in beside}
    from kernels import cpu

    missing = set(cpu.__all__) - {"cache_is_cold"} - set(ours)
    assert missing == {"stft_magnitude_forward", "stft_magnitude_backward"}
    for name, function in ours.items():
        names = list(inspect.signature(function).parameters)
        assert names == list(inspect.signature(getattr(reference, name)).parameters), name
        twin = getattr(cpu, name).__module__
        file = function.__module__.rsplit(".", 1)[-1]
        assert twin in (f"kernels.cpu.{file}", "kernels.reference"), f"{name} lies in another file of the cpu's"
    for name in arrays.__all__:
        if inspect.isfunction(getattr(host, name)):
            names = list(inspect.signature(getattr(arrays, name)).parameters)
            assert names == list(inspect.signature(getattr(host, name)).parameters), name
    public = {n for n, v in vars(host).items() if getattr(v, "__module__", "") == "kernels.host"} | {"WAITS"}
    assert public == set(arrays.__all__)


# --- products ----------------------------------------------------------------------------------------------------

# Rows, inputs, outputs; the last two are read four numbers at a time.
SIZES = [(1, 1, 1), (3, 5, 7), (5, 17, 33), (18, 19, 9), (2, 3, 70), (4, 8, 20), (20, 12, 4)]


@pytest.mark.parametrize(("N", "I", "J"), SIZES)
def test_dense(N, I, J):
    x, w, b, dy = numbers(N, I), numbers(I, J), numbers(J), numbers(N, J)
    agree("dense_forward", x, w, b)
    agree("dense_backward_input", dy, w)
    agree("dense_backward_weights", x, dy)
    agree("dense_backward_bias", dy)


@pytest.mark.parametrize(("N", "I", "J"), [(3, 5, 7), (70, 3, 2), (4, 17, 18), (8, 4, 20)])
def test_dense_update(N, I, J):
    """(70, 3, 2) is summed in parts, the others in one."""
    x, dy, w, v = numbers(N, I), numbers(N, J), numbers(I, J), numbers(I, J)
    ours = [on_device(w), on_device(v)]
    truth = [wide(w), wide(v)]
    cuda.dense_update_weights(on_device(x), on_device(dy), *ours, 0.1, 0.8)
    reference.dense_update_weights(wide(x), wide(dy), *truth, 0.1, 0.8)
    for got, true in zip(ours, truth, strict=True):
        np.testing.assert_allclose(arrays.asnumpy(got), true, rtol=1e-5, atol=1e-5)


def test_a_part_of_an_array_need_not_begin_where_four_numbers_do():
    """Rows of 8 from the first number of a row of 5 on: sizes divide by four, places do not."""
    x, w, b = on_device(numbers(5, 3))[1:4].reshape(-1)[:8].reshape(1, 8), numbers(8, 4), numbers(4)
    y = cuda.dense_forward(x, on_device(w), on_device(b))
    np.testing.assert_allclose(arrays.asnumpy(y), wide(arrays.asnumpy(x)) @ w + b, rtol=1e-5, atol=1e-5)
    assert not matmul._in_fours(matmul.whole(x), 8)
    assert matmul._in_fours(matmul.whole(on_device(w)), 4)


def test_long_sums_are_cut_into_parts():
    parts, count = matmul.product_parts(
        matmul.whole(on_device(numbers(2, 90))), matmul.whole(on_device(numbers(90, 3))), 2, 3, 90, matmul.PLAIN
    )
    assert count > 1
    assert parts.shape == (count, 6)


@pytest.mark.parametrize("shape", [matmul.Shape(128, 128, 8, 8, 8), matmul.Shape(32, 128, 16, 4, 8)])
@pytest.mark.parametrize("layout", [matmul.PLAIN, matmul.TURNED_B, matmul.TURNED_A])
def test_the_gpus_tiles(shape, layout):
    """The shapes that a GPU gets, on one small product."""
    M, N, K = 5, 6, 3
    name = f"test {shape} {layout}"
    run = matmul.make_product(shape, layout, matmul.BIAS, name)
    del device.KERNELS[name]
    a, b, bias = numbers(M, K), numbers(K, N), numbers(N)
    a_there = on_device(a.T if layout == matmul.TURNED_A else a)
    b_there = on_device(b.T if layout == matmul.TURNED_B else b)
    out = arrays.asarray(np.full((M, N), np.nan, np.float32))
    run(
        (1, 1, 1), a_there, 0, a_there.shape[1], b_there, 0, b_there.shape[1],
        out, on_device(bias), M, N, K, 16, 0, 0.0, 0.0,
    )  # fmt: skip
    np.testing.assert_allclose(arrays.asnumpy(out), wide(a) @ b + bias, rtol=1e-5, atol=1e-5)


# --- convolution -------------------------------------------------------------------------------------------------

IMAGES = [(1, 4, 4, 1, 3), (2, 5, 7, 1, 9), (1, 9, 3, 3, 2), (2, 2, 11, 5, 5), (1, 3, 2, 2, 4)]  # B, T, F, C, O


@pytest.mark.parametrize(("B", "T", "F", "C", "O"), IMAGES)
def test_conv_relu_pool(B, T, F, C, O):
    x, w, b = numbers(B, T, F, C), numbers(3, 3, C, O), numbers(O)
    y, argmax = agree("conv_relu_pool_forward", x, w, b)
    dy, places = numbers(*y.shape), arrays.asnumpy(argmax)
    agree("conv_relu_pool_backward", dy, places, x, w)
    assert agree("conv_relu_pool_backward", dy, places, x, w, need_dx=False)[0] is None


def test_every_place_of_the_maximum_occurs():
    _, argmax = agree("conv_relu_pool_forward", numbers(2, 8, 8, 1), numbers(3, 3, 1, 4), numbers(4))
    assert set(np.unique(arrays.asnumpy(argmax))) == {0, 1, 2, 3, DEAD}


def test_not_a_number_survives_pooling():
    x = numbers(1, 4, 4, 1)
    x[0, 1, 1, 0] = np.nan
    w, b = numbers(3, 3, 1, 2), numbers(2)
    y, argmax = cuda.conv_relu_pool_forward(*map(on_device, (x, w, b)))
    truth, places = reference.conv_relu_pool_forward(x, w, b)
    np.testing.assert_array_equal(np.isnan(arrays.asnumpy(y)), np.isnan(truth))
    np.testing.assert_array_equal(arrays.asnumpy(argmax), places)


@pytest.mark.parametrize(("B", "T", "F", "C", "O"), IMAGES[1:3])
def test_conv3x3(B, T, F, C, O):
    x, w, b, dy = numbers(B, T, F, C), numbers(3, 3, C, O), numbers(O), numbers(B, T, F, O)
    agree("conv3x3_forward", x, w, b)
    agree("conv3x3_backward", dy, x, w)
    agree("conv3x3_backward", dy, x, w, need_dx=False)


def test_more_images_than_a_launch_has_blocks_for(monkeypatch):
    monkeypatch.setattr(conv, "MOST_BLOCKS", 3)
    for B, O in ((5, 4), (4, 12)):  # of 12 output channels, an image takes two blocks
        x, w = numbers(B, 4, 4, 2), numbers(3, 3, 2, O)
        y, argmax = agree("conv_relu_pool_forward", x, w, numbers(O))
        agree("conv_relu_pool_backward", numbers(*y.shape), arrays.asnumpy(argmax), x, w)
        agree("conv3x3_backward", numbers(B, 4, 4, O), x, w)


def test_what_is_empty():
    """No steps, no outputs, no channels."""
    _, c, gates = agree("lstm_forward", numbers(2, 0, 12), numbers(3, 12))
    agree("lstm_backward", numbers(2, 0, 3), arrays.asnumpy(gates), arrays.asnumpy(c), numbers(3, 12))
    agree("dense_backward_bias", numbers(3, 0))
    dy = numbers(2, 4, 4, 3)
    _, dw, db = cuda.conv3x3_backward(*map(on_device, (dy, numbers(2, 4, 4, 0), numbers(3, 3, 0, 3))), need_dx=False)
    assert dw.shape == (3, 3, 0, 3)
    np.testing.assert_allclose(arrays.asnumpy(db), dy.sum(axis=(0, 1, 2)), rtol=1e-5)


def test_relu_and_pooling_alone():
    x = numbers(2, 5, 4, 3)
    (y,) = agree("relu_forward", x)
    agree("relu_backward", numbers(2, 5, 4, 3), arrays.asnumpy(y))
    y, argmax = agree("maxpool2x2_forward", x)
    agree("maxpool2x2_backward", numbers(*y.shape), arrays.asnumpy(argmax), x_shape=(2, 5, 4, 3))


# --- LSTM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "T", "H"), [(1, 1, 1), (2, 5, 3), (3, 4, 4), (3, 3, 5), (5, 4, 6)])
def test_lstm(B, T, H):
    """Up to SEQUENCE_UNITS one launch for the sequence, above it one product a step."""
    assert lstm.SEQUENCE_UNITS == 4
    z, wh, dh = numbers(B, T, 4 * H), numbers(H, 4 * H), numbers(B, T, H)
    _, c, gates = agree("lstm_forward", z, wh)
    agree("lstm_backward", dh, arrays.asnumpy(gates), arrays.asnumpy(c), wh)
    agree("lstm_inference", numbers(B, T, 2), numbers(2, 4 * H), wh, numbers(4 * H))


@pytest.mark.parametrize("bytes_granted", [0, 250, 300, 10**6])
def test_lstm_with_weights_in_all_three_places(monkeypatch, bytes_granted):
    """A sequence of 11 units: 4 rows of weights in registers, the others in shared memory, or read every step."""
    B, T, H = 2, 3, 11
    monkeypatch.setattr(lstm, "SEQUENCE_THREADS", 4 * 11)
    least = 4 * (4 * 12 + 4 * H)
    kept = []
    original = lstm.sequence_memory

    def granted(run, units):
        monkeypatch.setattr(run, "grant_shared", lambda wanted: min(wanted, least + bytes_granted * 4))
        kept.append(original(run, units)[1])
        return original(run, units)

    for module in (lstm, lstm_gradients):
        monkeypatch.setattr(module, "SEQUENCE_UNITS", 11)
        monkeypatch.setattr(module, "sequence_memory", granted)
    z, wh, dh = numbers(B, T, 4 * H), numbers(H, 4 * H), numbers(B, T, H)
    _, c, gates = agree("lstm_forward", z, wh)
    agree("lstm_backward", dh, arrays.asnumpy(gates), arrays.asnumpy(c), wh)
    assert kept == [{0: 0, 250: 4, 300: 4, 10**6: 8}[bytes_granted]] * 2


# --- the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.9])
def test_dropout_is_the_same_mask(rate):
    x = numbers(3, 7, 5)
    key = reference.dropout_key(3, 1, 12)
    got = arrays.asnumpy(cuda.dropout(on_device(x), rate, key))
    truth = reference.dropout(x, rate, key)
    np.testing.assert_array_equal(got == 0, truth == 0)
    np.testing.assert_allclose(got, truth, rtol=1e-6)


def test_loss():
    logits = 3 * numbers(9, 7)
    targets = rng.integers(0, 7, 9)
    agree("softmax", logits)
    _, p = agree("cross_entropy_forward", logits, targets)
    agree("cross_entropy_backward", arrays.asnumpy(p), targets)
    agree("cross_entropy_forward", logits, targets, smoothing=0.1)
    agree("cross_entropy_backward", arrays.asnumpy(p), targets, smoothing=0.1)
    p = on_device(reference.softmax(logits))
    tally, truth = arrays.Tally(), host.Tally()
    for loss in (0.5, 0.25):
        tally.add(on_device(np.array(loss, np.float32)), p, on_device(targets))
        truth.add(loss, arrays.asnumpy(p), targets)
    assert tally.read() == truth.read()


def test_saturated_loss():
    logits = np.array([[2000, 0, -2000], [1e4, -1e4, 0]], np.float32)
    agree("cross_entropy_forward", logits, np.array([2, 0]))
    close = np.array([[1000, 995]], np.float32)  # differences first: the largest logit would swallow the loss
    got, _ = cuda.cross_entropy_forward(on_device(close), on_device(np.array([0])))
    np.testing.assert_allclose(float(got), np.log1p(np.exp(-5.0)), rtol=1e-6)


def test_no_samples_at_all():
    w, b = numbers(3, 4), numbers(4)
    agree("dense_forward", numbers(0, 3), w, b)
    agree("dense_backward_input", numbers(0, 4), w)
    agree("dense_backward_weights", numbers(0, 3), numbers(0, 4))
    agree("dense_backward_bias", numbers(0, 4))
    wh = numbers(4, 16)
    h, c, gates = agree("lstm_forward", numbers(0, 5, 16), wh)
    agree("lstm_backward", *map(arrays.asnumpy, (h, gates, c)), wh)
    agree("lstm_inference", numbers(0, 5, 3), numbers(3, 16), wh, numbers(16))
    agree("conv3x3_forward", numbers(0, 6, 8, 2), numbers(3, 3, 2, 5), numbers(5))
    agree("maxpool2x2_forward", numbers(0, 6, 8, 2))
    agree("softmax", numbers(0, 3))
    frames, none = numbers(9, 4), np.zeros(0, np.int32)
    assert arrays.take_windows(on_device(frames), on_device(none), 3).shape == (0, 3, 4)
    assert host.take_windows(frames, none, 3).shape == (0, 3, 4)


def test_sgd():
    w, v, dw = numbers(7, 3), numbers(7, 3), numbers(7, 3)
    ours = [on_device(w), on_device(v)]
    cuda.sgd_update(*ours, on_device(dw), 0.1, 0.8)
    reference.sgd_update(w, v, dw, 0.1, 0.8)
    np.testing.assert_allclose(arrays.asnumpy(ours[0]), w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays.asnumpy(ours[1]), v, rtol=1e-5, atol=1e-6)


def test_moving():
    def same(name, *operands, **options):
        agree(name, *operands, module=host, rung=arrays, **options)

    x = numbers(2, 11, 3)
    same("step_before", x)
    same("last_step_forward", x)
    same("last_step_backward", numbers(2, 3), T=4)
    same("windows_forward", x, frames=5, hop=2, count=4)
    same("windows_backward", numbers(2, 4, 5, 3), total=11, hop=2)
    same("take_windows", numbers(20, 3), np.array([3, 0, 15]), length=5)
    place = np.array([[0, 1, 2], [1, 2, 4]])
    same("take_rows", numbers(5, 7), place)
    same("add_rows", numbers(6, 7), place, count=5)
    same("zeros_like", x)
    for longest in (0.5, 100.0):
        ours = arrays.shortened([on_device(x), on_device(2 * x[0])], longest)
        truth = host.shortened([wide(x), 2 * wide(x[0])], longest)
        for got, true in zip(ours, truth, strict=True):
            np.testing.assert_allclose(arrays.asnumpy(got), true, rtol=1e-5)


def test_arrays():
    x = on_device(numbers(4, 3))
    flat = arrays.asnumpy(x).reshape(-1)
    assert (x.size, x.ndim, len(x), x.dtype) == (12, 2, 4, np.float32)
    np.testing.assert_array_equal(arrays.asnumpy(x.reshape(2, -1)), flat.reshape(2, 6))
    np.testing.assert_array_equal(arrays.asnumpy(x[1:3]), flat.reshape(4, 3)[1:3])
    assert x[2:2].shape == (0, 3)
    with pytest.raises(ValueError, match="12 numbers"):
        x.reshape(5, 2)
    with pytest.raises(IndexError, match="whole rows"):
        x[::2]
    arrays.assign(x, np.ones((4, 3)))
    np.testing.assert_array_equal(arrays.asnumpy(x), 1)


def test_memory_is_used_again():
    x = device.empty((5, 13))
    place, view = x.memory, x[:2]
    del x
    assert device.empty((13, 5)).memory is not place  # the view still holds it
    del view
    assert device.empty((65,)).memory is place


def test_wrong_operands():
    x, w, b = on_device(numbers(2, 3)), on_device(numbers(4, 5)), on_device(numbers(5))
    with pytest.raises(ValueError, match=r"w has shape \(4, 5\)"):
        cuda.dense_forward(x, w, b)
    with pytest.raises(TypeError, match="b is not one"):
        cuda.dense_forward(on_device(numbers(2, 4)), w, numbers(5))
    with pytest.raises(TypeError, match="targets is float32"):
        cuda.cross_entropy_forward(x, on_device(numbers(2)))


def test_the_same_bits_twice():
    x, dy, places = numbers(2, 6, 6, 3), numbers(2, 3, 3, 4), rng.integers(0, 5, (2, 3, 3, 4)).astype(np.uint8)
    w = numbers(3, 3, 3, 4)
    one, two = (cuda.conv_relu_pool_backward(*map(on_device, (dy, places, x, w))) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(first), arrays.asnumpy(second))


# --- networks ----------------------------------------------------------------------------------------------------

SMALL = {
    "cnn": {"filters": 2, "hidden": 5, "bins": 6},
    "lstm": {"hidden": 2, "bins": 3},
    "tdcnn": {"filters": 2, "hidden": 5, "bins": 4},
}


def twins(arch, **options):
    return [build_model(arch, backend=b, seed=3, classes=3, **SMALL[arch], **options) for b in ("cuda", "cpu")]


@pytest.mark.parametrize("arch", SMALL)
def test_five_steps_have_the_same_losses(arch):
    models = twins(arch)
    x = numbers(3, models[0].input_frames, SMALL[arch]["bins"])
    y = np.array([0, 2, 1])
    sgds = [SGD(lr=0.1, clip_norm=0.02 if arch == "lstm" else None) for _ in models]
    for _ in range(5):
        ours, theirs = (model.train_step(x, y, sgd) for model, sgd in zip(models, sgds, strict=True))
        assert isinstance(ours, float)
        assert ours == pytest.approx(theirs, abs=1e-4)
    for name, value in models[0].params.items():
        assert isinstance(value, np.ndarray)
        np.testing.assert_allclose(value, models[1].params[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_lstm_is_clipped_above():
    """The clipping of the test before this one changes something."""
    model = twins("lstm")[1]
    x, y = numbers(3, 3, 3), np.array([0, 2, 1])
    _, grads = model.loss_and_grads(x, y)
    assert np.sqrt(sum((g**2).sum() for g in grads.values())) > 0.02


def test_gradients_probabilities_and_files(tmp_path):
    ours, theirs = twins("lstm")
    x, y = numbers(3, 3, 3), np.array([0, 2, 1])
    loss, grads = ours.loss_and_grads(x, y)
    truth, true_grads = theirs.loss_and_grads(x, y)
    assert loss == pytest.approx(truth, abs=1e-5)
    for name, value in grads.items():
        np.testing.assert_allclose(value, true_grads[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(ours.predict_proba(x, batch_size=2), theirs.predict_proba(x), rtol=1e-4)
    assert ours.predict_proba(x[:0]).shape == (0, 3)
    ours.save(tmp_path / "m.npz")
    again = load_model(tmp_path / "m.npz", backend="cuda")
    for name, value in again.params.items():
        np.testing.assert_array_equal(value, ours.params[name])


def small_task(bins, length, epochs):
    utterances = [numbers(length + n, bins) for n in (0, 2, 3)]
    scale = Standardisation(np.zeros(bins, np.float32), np.ones(bins, np.float32))
    windows = WindowSet(utterances, scale, length, 1)
    return Task(windows, np.array([0, 1, 2])[windows.owner], (0, 0, 0), epochs, 5)


def test_training_and_votes_are_those_of_the_cpu(tmp_path):
    """Two epochs, with a stop and a checkpoint between them on the device."""
    models = twins("lstm")
    task = small_task(3, 3, 2)
    progress = Progress(100)
    progress.begin_fold("", 100)
    stopped, path = small_task(3, 3, 1), tmp_path / "c.npz"
    stopped = Task(task.windows, task.targets, task.seed, 1, task.batch_size)
    sgd = SGD()
    done = list(train_epochs(models[0], sgd, stopped, progress))
    Checkpoint(path, "x", progress).save(models[0], sgd, done)
    fresh = build_model("lstm", backend="cuda", seed=9, classes=3, **SMALL["lstm"])
    ours = fit(fresh, task, progress, Checkpoint(path, "x", progress))
    theirs = fit(models[1], task, progress)
    assert len(ours) == 2
    for one, two in zip(ours, theirs, strict=True):
        assert one.loss == pytest.approx(two.loss, abs=1e-4)
        assert one.accuracy == two.accuracy
    votes, truth = evaluate(fresh, task.windows), evaluate(models[1], task.windows)
    np.testing.assert_allclose(votes.probabilities, truth.probabilities, atol=1e-4)


@pytest.mark.parametrize("arch", SMALL)
def test_windows_of_recordings_are_scored_as_on_the_cpu(arch, monkeypatch):
    """Recordings of several windows, in several groups; the cpu shares work between the windows, the GPU does not."""
    ours, theirs = twins(arch)
    bins, length = SMALL[arch]["bins"], ours.input_frames
    recordings = [(numbers(length + 3, bins), np.array([0, 2, 3])), (numbers(length, bins), np.array([0]))]
    monkeypatch.setattr(inference, "TOGETHER", 2)
    got = inference.window_probabilities(ours, recordings)
    assert got.shape == (4, 3)
    np.testing.assert_allclose(got, inference.window_probabilities(theirs, recordings), atol=1e-4)


def test_a_recording_is_labelled(tmp_path):
    """python -m npser.predict's way: model file, frames by the cpu, probabilities by the device."""
    model = build_model("lstm", seed=3, hidden=2, classes=3)
    model.scale = Standardisation(np.zeros(128, np.float32), np.ones(128, np.float32))
    model.save(tmp_path / "m.npz")
    soundfile.write(tmp_path / "a.wav", 0.1 * numbers(128 * 128), 16000)
    source = Input("a", str(tmp_path / "a.wav"))
    ours, theirs = (
        [segment.p for _, segment in segments([load_model(tmp_path / "m.npz", backend=backend)], source, 64)]
        for backend in ("cuda", "cpu")
    )
    assert len(ours) == 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_divergence_is_found_when_the_tally_is_read():
    model = twins("lstm")[0]
    task = small_task(3, 3, 1)
    task.windows.everything[:] = np.nan
    progress = Progress(10)
    progress.begin_fold("", 10)
    with pytest.raises(RunFailed, match="diverged"):
        list(train_epochs(model, SGD(), task, progress))


def test_too_small_a_gpu_ends_the_command_in_one_line(monkeypatch, tmp_path, tones):
    """python -m npser.train and python -m npser.predict, on a device that refuses to give memory."""

    def refuse(*arguments, **options):
        raise MemoryError("CUDA_ERROR_OUT_OF_MEMORY")

    build_model("lstm", hidden=2, classes=2).save(tmp_path / "m.npz")
    monkeypatch.setattr(device, "_pool", {})
    monkeypatch.setattr(device.cuda, "device_array", refuse)
    options = ["--backend", "cuda", "--threads", "1"]
    line = r"^(--)?backend cuda: the GPU's memory does not suffice \([0-9]+ MB more were asked for\): [^\n]+$"
    with pytest.raises(UserError, match=line):
        train(["--arch", "lstm", "--data", str(tones), "--folds", "2", "--out", str(tmp_path / "run"), *options])
    with pytest.raises(UserError, match=line):
        load_model(tmp_path / "m.npz", backend="cuda")


# --- bench on a device ----------------------------------------------------------------------------------------------


WORKLOADS = {
    "conv_block": {"B": 1, "T": 4, "F": 4, "C": 1, "O": 2, "backward": True, "need_dx": False},
    "conv3x3": {"B": 1, "T": 3, "F": 4, "C": 2, "O": 2, "backward": True},
    "maxpool": {"B": 1, "T": 4, "F": 4, "C": 2},
    "relu": {"N": 9},
    "sgd": {"N": 9},
    "dense_forward": {"N": 2, "I": 5, "J": 3},
    "dense_backward_input": {"N": 2, "I": 5, "J": 3},
    "dense_update": {"N": 2, "I": 5, "J": 3},
    "lstm": {"B": 2, "T": 2, "I": 3, "H": 2, "backward": True},
    "cross_entropy": {"B": 3, "K": 4},
    "train": {"arch": "lstm", "B": 2, "model": SMALL["lstm"]},
    "infer": {"arch": "cnn", "B": 2, "model": SMALL["cnn"]},
}


@pytest.mark.parametrize("kind", WORKLOADS)
def test_the_benchmark_computes_what_the_reference_does(kind):
    from bench.peers import CUDA_OURS, REFERENCE

    sizes = WORKLOADS[kind]
    found, truth = (
        workloads.sampled(candidate.prepare(kind, workloads.inputs(kind, sizes), sizes).outputs())
        for candidate in (CUDA_OURS, REFERENCE)
    )
    assert workloads.difference(found, truth)[0] <= 1e-4
    prepared = CUDA_OURS.prepare(kind, workloads.inputs(kind, sizes), sizes)
    prepared.begin()()
    from bench.gpu import by_events

    assert prepared.seconds is by_events


def test_what_is_not_timed_on_a_device():
    from bench.peers import CUDA_OURS

    assert CUDA_OURS.prepare("stft", {}, {"N": 5}) is None
    assert CUDA_OURS.prepare("label", {}, {}) is None


def test_the_peak_is_of_the_multiply_adds_it_counts(monkeypatch):
    from bench import gpu

    calls = []

    def once(call, count):
        call()
        calls.append(count)
        return 1e-3 * count

    monkeypatch.setattr(gpu, "by_events", once)
    monkeypatch.setattr(gpu, "AWAKE", 0.0)
    rates = gpu.measure(steps=24)
    threads = 8 * device.multiprocessors() * device.THREADS
    assert rates["flops"] == pytest.approx(2 * gpu.SUMS * 24 * threads / 1e-3)
    assert rates["read"] == pytest.approx(8 * gpu.COPIED / 1e-3)
    assert calls == 2 * [1, *gpu.REPEATS * [gpu.CALLS]]
    now = iter((0.0, 0.1, 0.2, 0.3, 0.4))
    monkeypatch.setattr(gpu, "AWAKE", 0.3)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    del calls[:]
    assert gpu._best(lambda: None) == pytest.approx(1e-3)
    assert calls == [1, *(2 + gpu.REPEATS) * [gpu.CALLS]]  # two of them before the clock counts
