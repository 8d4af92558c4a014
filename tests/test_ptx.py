"""`kernels.cuda` as a GPU gets it: every kernel's PTX, executed by `ptx_machine`, against the reference and the cpu.

Sizes are small, odd, and cross the edges of the tiles. What a kernel does wrong in memory ends a test, too.
"""

import importlib.util
import re
from functools import partial

import numpy as np
import ptx_machine
import pytest
from operands import Numbers, special

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed"),
    pytest.mark.skipif(ptx_machine.COMPILER is None, reason="there is no C compiler"),
]
rng = np.random.default_rng(0)
TOLERANCE = {"float32": 2e-5, "tf32": 5e-3}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    from kernels.cuda import arrays, device

    if device.SIMULATED:
        pytest.skip("NUMBA_ENABLE_CUDASIM is set")
    assert arrays  # with it, every module that has kernels is imported
    with pytest.MonkeyPatch.context() as patch:
        yield ptx_machine.install(patch, tmp_path_factory.mktemp("ptx"))
    ptx_machine.forget()


@pytest.fixture(params=TOLERANCE)
def precision(request, machine):
    from kernels import cuda

    cuda.settings.precision = request.param
    yield request.param
    cuda.settings.precision = "float32"


def numbers(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def agree(name, *operands, on=None, like=None, tolerance=TOLERANCE["float32"], **options):
    """The operation on the machine, in float32, against the reference in float64 of the same numbers."""
    from kernels import cuda, reference
    from kernels.cuda import arrays

    there = [arrays.asarray(x) if isinstance(x, np.ndarray) else x for x in operands]
    wide = [x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x for x in operands]
    got, truth = getattr(on or cuda, name)(*there, **options), getattr(like or reference, name)(*wide, **options)
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, truth)), strict=True)
    found = []
    for ours, theirs in pairs:
        found.append(None if ours is None else arrays.asnumpy(ours))
        if theirs is not None:
            scale = 1 if found[-1].dtype == np.uint8 else max(1e-30, np.abs(theirs).max(initial=0))
            np.testing.assert_allclose(found[-1] / scale, theirs / scale, rtol=0, atol=tolerance, err_msg=name)
    return found


# Rows, inputs, outputs: less than a tile, more than one, nothing or everything in fours, one part or several.
@pytest.mark.parametrize(
    ("N", "I", "J"), [(1, 1, 1), (3, 5, 7), (33, 17, 34), (129, 130, 131), (132, 64, 260), (5, 1024, 8), (4, 8, 20)]
)
def test_dense(machine, precision, N, I, J):
    from kernels import cuda, reference
    from kernels.cuda import arrays

    x, w, b, dy, v = numbers(N, I), numbers(I, J), numbers(J), numbers(N, J), numbers(I, J)
    tolerance = TOLERANCE[precision]
    agree("dense_forward", x, w, b, tolerance=tolerance)
    agree("dense_backward_input", dy, w, tolerance=tolerance)
    agree("dense_backward_weights", x, dy, tolerance=tolerance)
    agree("dense_backward_bias", dy)
    ours, true = [arrays.asarray(w), arrays.asarray(v)], [w.astype(np.float64), v.astype(np.float64)]
    cuda.dense_update_weights(arrays.asarray(x), arrays.asarray(dy), *ours, 0.01, 0.8)
    reference.dense_update_weights(x, dy, *true, 0.01, 0.8)
    for got, truth in zip(ours, true, strict=True):
        np.testing.assert_allclose(arrays.asnumpy(got), truth, rtol=0, atol=tolerance)


# Registers hold 56 rows of weights, shared memory up to 128; a wider layer is one product a step.
@pytest.mark.parametrize(
    ("B", "T", "H"), [(2, 5, 3), (1, 3, 56), (2, 3, 57), (2, 3, 77), (2, 4, 128), (3, 3, 129), (33, 2, 132)]
)
def test_lstm(machine, precision, B, T, H):
    check_lstm(B, T, H, TOLERANCE[precision])


def check_lstm(B, T, H, tolerance):
    z, wh = numbers(B, T, 4 * H), numbers(H, 4 * H) / np.float32(H**0.5)
    _, c, gates = agree("lstm_forward", z, wh, tolerance=tolerance)
    agree("lstm_backward", numbers(B, T, H), gates, c, wh, tolerance=tolerance)
    layer = numbers(7, 4 * H) / np.float32(7**0.5), wh, numbers(4 * H)
    agree("lstm_inference", numbers(B, T, 7), *layer, tolerance=tolerance)


@pytest.fixture(params=[48 * 1024, 99 * 1024], ids=["48 KB", "99 KB"])
def less_shared_memory(request, machine, monkeypatch):
    """As much as every GPU gives without asking; as much as those of compute capability 8.6 have."""
    from kernels.cuda import device

    monkeypatch.setattr(machine, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", request.param)
    for name in ("lstm_sequence", "lstm_sequence_backward"):
        monkeypatch.setattr(device.KERNELS[name], "_granted", device.DEFAULT_SHARED)
    device._most_shared.cache_clear()
    yield request.param
    device._most_shared.cache_clear()


@pytest.mark.parametrize("H", [78, 128])
def test_lstm_whose_weights_are_partly_read_again_in_every_step(less_shared_memory, H):
    from kernels.cuda import lstm

    _, kept, size = lstm.sequence_memory(lstm._lstm_sequence, H)
    assert size <= less_shared_memory
    if (H, less_shared_memory) != (78, 99 * 1024):  # where all of them fit
        assert 0 < kept < H - lstm.REGISTER_ROWS
    check_lstm(2, 3, H, TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("B", "T", "F", "C", "O"),
    [(1, 2, 2, 1, 1), (2, 33, 35, 1, 33), (1, 18, 20, 12, 36), (2, 5, 47, 5, 37), (1, 20, 6, 40, 1), (1, 8, 8, 8, 32)],
)
def test_convolution(machine, B, T, F, C, O):
    x, w, b = numbers(B, T, F, C), numbers(3, 3, C, O), numbers(O)
    y, argmax = agree("conv_relu_pool_forward", x, w, b)
    dy = numbers(*y.shape)
    agree("conv_relu_pool_backward", dy, argmax, x, w)
    agree("conv3x3_forward", x, w, b)
    agree("conv3x3_backward", numbers(B, T, F, O), x, w)
    agree("relu_backward", numbers(*x.shape), *agree("relu_forward", x))
    y, argmax = agree("maxpool2x2_forward", x)
    agree("maxpool2x2_backward", numbers(*y.shape), argmax, x_shape=x.shape)


def test_the_rest(machine):
    from kernels import host, reference
    from kernels.cuda import arrays

    for shape, rate in (((3, 7, 5), 0.25), ((70_000,), 0.9), ((9,), 0.0)):
        agree("dropout", numbers(*shape), rate, reference.dropout_key(2**40, 2, 99_999))
    for B, K in ((1, 1), (9, 7), (300, 3)):
        logits, targets = 3 * numbers(B, K), rng.integers(0, K, B)
        agree("softmax", logits)
        _, p = agree("cross_entropy_forward", logits, targets)
        agree("cross_entropy_backward", p, targets)
        agree("cross_entropy_forward", logits, targets, smoothing=0.3)
        agree("cross_entropy_backward", p, targets, smoothing=0.3)
    moved = {"on": arrays, "like": host}
    x, place = numbers(2, 40, 9), np.array([[0, 1, 2], [1, 2, 4]])
    for name, *operands in [("step_before", x), ("last_step_forward", x), ("last_step_backward", numbers(2, 9), 4)]:
        agree(name, *operands, **moved)
    agree("zeros_like", x, **moved)
    agree("windows_forward", x, frames=34, hop=2, count=4, **moved)
    agree("windows_backward", numbers(2, 4, 34, 9), total=40, hop=2, **moved)
    agree("take_windows", numbers(20, 9), np.array([3, 0, 15]), length=5, **moved)
    agree("take_rows", numbers(5, 9), place, **moved)
    agree("add_rows", numbers(6, 9), place, count=5, **moved)


def with_nan(*shape):
    """Numbers of which one is not."""
    x = numbers(*shape)
    x.flat[rng.integers(x.size)] = np.nan
    return x


def same_kind(name, *operands, **options):
    """Infinities, not-a-number and places of maxima are where they are in the reference's results."""
    from kernels import cuda, reference
    from kernels.cuda import arrays

    got = getattr(cuda, name)(*map(arrays.asarray, operands), **options)
    with np.errstate(all="ignore"):
        truth = getattr(reference, name)(*operands, **options)
    found = []
    for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, truth)), strict=True):
        found.append(arrays.asnumpy(ours))
        if theirs is not None:
            kinds = [np.where(np.isfinite(x) & (np.asarray(x).dtype != np.uint8), 0, x) for x in (found[-1], theirs)]
            np.testing.assert_array_equal(*kinds, err_msg=name)
    return found


def test_what_is_no_number_stays_none(machine):
    for seed in range(3):
        unusual = partial(special, Numbers(seed))
        same_kind("relu_forward", unusual(3, 7, 5))
        _, argmax = same_kind("maxpool2x2_forward", unusual(2, 6, 7, 5))
        same_kind("maxpool2x2_backward", unusual(2, 3, 3, 5), argmax, x_shape=(2, 6, 7, 5))
        same_kind("softmax", unusual(9, 3))
        _, p = same_kind("cross_entropy_forward", with_nan(9, 3), rng.integers(0, 3, 9))
        same_kind("cross_entropy_backward", p, rng.integers(0, 3, 9))
        same_kind("dense_forward", with_nan(5, 7), numbers(7, 9), numbers(9))
        for C, O in ((1, 5), (6, 4)):
            same_kind("conv_relu_pool_forward", with_nan(2, 6, 8, C), numbers(3, 3, C, O), numbers(O))
    for H in (5, 130):
        z = numbers(2, 3, 4 * H)
        z[0, 0, H + 1] = np.nan  # a forget gate of the first step
        same_kind("lstm_forward", z, numbers(H, 4 * H) / np.float32(H))


SMALL = {
    "cnn": {"filters": 5, "hidden": 130, "bins": 24},
    "lstm": {"hidden": 20, "bins": 9},
    "tdcnn": {"filters": 4, "hidden": 132, "bins": 16},
}


@pytest.mark.parametrize("arch", SMALL)
def test_training_is_that_of_the_cpu(machine, arch):
    """Steps, with dropout, clipping (lstm), and windows that neighbours share (tdcnn); the tally of all of them."""
    from npser.models import build_model
    from npser.optim import SGD

    seen, ours = [], {}
    for backend in ("cuda", "cpu"):
        model, sgd = build_model(arch, backend=backend, seed=3, classes=3, **SMALL[arch]), SGD(lr=0.05)
        sgd.clip_norm = 0.5 if arch == "lstm" else None
        k, draw = model.arrays, np.random.default_rng(1)
        x = draw.standard_normal((3, model.input_frames, SMALL[arch]["bins"]), dtype=np.float32)
        targets, tally = k.asarray(np.array([0, 2, 1])), k.Tally()
        for _ in range(3):
            tally.add(*model.train_batch(k.asarray(x), targets, sgd), targets)
        if arch == "tdcnn":
            starts = np.array([0, 8, 16])
            distinct, place = model.distinct_windows(starts)
            frames = draw.standard_normal((80, 16), dtype=np.float32)
            windows = k.take_windows(k.asarray(frames), k.asarray(distinct), model.window_frames)
            tally.add(*model.train_batch(windows, targets, sgd, k.asarray(place)), targets)
        seen.append(tally.read())
        for name, value in model.params.items():
            np.testing.assert_allclose(value, ours.setdefault(name, value), rtol=0, atol=1e-5, err_msg=name)
        p = model.predict_proba(x)
        np.testing.assert_allclose(p, ours.setdefault("p", p), rtol=0, atol=1e-5)
    np.testing.assert_allclose(*seen, rtol=1e-5)


def test_every_kernel_was_executed(machine):
    from kernels.cuda import device

    if len(machine.launched) < 40:
        pytest.skip("not all tests of this file ran")
    assert {name for name in device.KERNELS if not name.startswith("peak")} == set(machine.launched)


# --- what the machine looks for ------------------------------------------------------------------------------------


def faults():
    """Kernels of 64 threads that do something wrong: (function, what is said of it)."""
    from kernels.cuda.conv import cuda, float32, index, load4

    def beyond(x):
        x[index(cuda.threadIdx.x + 1)] = float32(0)

    def crooked(x):
        x[index(cuda.threadIdx.x)] = load4(x, cuda.threadIdx.x)[0]

    def hasty(x):
        tile = cuda.shared.array(64, float32)
        t = cuda.threadIdx.x
        tile[t] = x[t]
        x[t] = tile[63 - t]

    def early(x):
        tile = cuda.shared.array(64, float32)
        t = cuda.threadIdx.x
        tile[t] = x[t]
        cuda.syncthreads()
        tile[t] = tile[63 - t]
        x[t] = tile[t]

    def crowded(x):
        x[index(cuda.threadIdx.x // 2)] = float32(cuda.threadIdx.x)

    def unequal(x):
        if cuda.threadIdx.x < 32:
            return
        cuda.syncthreads()
        x[index(cuda.threadIdx.x)] = float32(0)

    return {
        beyond: "a store outside of all arrays",
        crooked: "global memory: not aligned",
        hasty: "what another thread writes is touched|nobody wrote",
        early: "what another thread reads is written|what another thread writes is touched",
        crowded: "what another thread writes is touched",
        unequal: "some threads ended, others wait at a barrier",
    }


@pytest.mark.parametrize("name", ["beyond", "crooked", "hasty", "early", "crowded", "unequal"])
def test_faults_are_seen(machine, name):
    from kernels.cuda import device

    ((function, said),) = [(f, said) for f, said in faults().items() if f.__name__ == name]
    kernel = device.Kernel(function, f"faulty_{name}", (device.F,), 64, 1)
    with pytest.raises(AssertionError, match=re.compile(said)):
        kernel(1, device.empty((64,)))
