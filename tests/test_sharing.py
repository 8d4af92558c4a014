"""Training on the distinct windows of a batch: the same losses and parameters as on every sample's own windows."""

import numpy as np
import pytest

from npser.features import Standardisation, WindowSet
from npser.folds import oversampled_runs, random_oversampling, runs
from npser.models import WINDOW_HOP, build_model
from npser.optim import SGD
from npser.progress import Progress
from npser.trainer import Task, train_epochs

BINS = 16
FRAMES = BINS + 3 * WINDOW_HOP


def networks(backend, dropout=0.0):
    dtype = "float64" if backend == "reference" else "float32"
    settings = {"filters": 3, "hidden": 5, "bins": BINS, "dropout": dropout, "dtype": dtype}
    return [build_model("tdcnn", backend=backend, seed=3, **settings) for _ in range(2)]


def batch(model, starts):
    rng = np.random.default_rng(8)
    frames = rng.standard_normal((120, BINS)).astype(model.dtype)
    x = np.stack([frames[start : start + FRAMES] for start in starts])
    distinct, place = model.distinct_windows(np.array(starts))
    return x, np.stack([frames[start : start + BINS] for start in distinct]), place, rng.integers(0, 7, len(starts))


def test_distinct_windows():
    model = networks("reference")[0]
    distinct, place = model.distinct_windows(np.array([40, 8, 16, 40, 3]))
    np.testing.assert_array_equal(distinct, [3, 8, 11, 16, 19, 24, 27, 32, 40, 48, 56, 64])
    np.testing.assert_array_equal(distinct[place], [[s + 8 * i for i in range(4)] for s in (40, 8, 16, 40, 3)])


@pytest.mark.parametrize(("backend", "tolerance"), [("reference", 1e-12), ("cpu", 1e-5)])
def test_a_step_on_distinct_windows_is_the_same_step(backend, tolerance):
    """Without dropout, where windows share their masks: to the loss and to every parameter after three updates."""
    one_by_one, shared = networks(backend)
    starts = [0, 8, 16, 24, 64, 80, 80, 33]
    x, windows, place, y = batch(shared, starts)
    assert len(windows) < 4 * len(starts) / 2 + 6
    first, second = SGD(), SGD()
    for _ in range(3):
        loss, p = one_by_one.train_batch(x, y, first)
        shared_loss, shared_p = shared.train_batch(windows, y, second, place)
        assert shared_loss == pytest.approx(loss, rel=tolerance)
        np.testing.assert_allclose(shared_p, p, atol=tolerance)
    for name, value in one_by_one.params.items():
        np.testing.assert_allclose(shared.params[name], value, atol=tolerance, err_msg=name)


def test_a_window_has_one_mask_for_all_samples():
    """Two samples of the same windows say the same under dropout, where they are computed once."""
    one_by_one, shared = networks("cpu", dropout=0.5)
    x, windows, place, y = batch(shared, [16, 16])
    _, p = shared.train_batch(windows, y, SGD(), place)
    np.testing.assert_array_equal(p[0], p[1])
    _, p = one_by_one.train_batch(x, y, SGD())
    assert not np.array_equal(p[0], p[1])


def test_runs():
    owner = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2])
    assert [list(run) for run in runs(owner, 3)] == [[0, 1, 2], [3], [4, 5, 6], [7, 8]]
    assert [list(run) for run in runs(owner, 1)] == [[i] for i in range(9)]


@pytest.mark.parametrize("longest", [1, 4])
def test_oversampling_repeats_whole_runs(longest):
    owner = np.repeat(np.arange(6), [10, 9, 3, 1, 5, 2])
    targets = np.array([0, 0, 1, 1, 2, 2])[owner]
    pieces = runs(owner, longest)
    made = oversampled_runs(targets, pieces, np.random.default_rng(4))
    for piece, mine in zip(pieces, made, strict=False):
        np.testing.assert_array_equal(piece, mine)
    everything = np.concatenate(made)
    np.testing.assert_array_equal(np.bincount(targets[everything]), 19)
    assert all(np.ptp(owner[run]) == 0 and (np.diff(run) == 1).all() for run in made)
    if longest == 1:
        np.testing.assert_array_equal(everything, random_oversampling(targets, np.random.default_rng(4)))


def test_training_with_shared_windows():
    """An epoch sees every sample as often as without sharing, and learns."""
    rng = np.random.default_rng(2)
    bins = 128  # what a corpus has
    frames = [rng.standard_normal((200, bins)).astype(np.float32) + number % 2 for number in range(6)]
    model = build_model("tdcnn", filters=2, hidden=4, bins=bins, classes=2, seed=1)
    windows = WindowSet(frames, Standardisation.of(frames), model.input_frames, 8)
    task = Task(windows, windows.owner % 2, (0, 0, 0), epochs=8, batch_size=8, share_windows=4)
    assert sorted(np.concatenate(task.oversampled())) == list(range(len(windows)))
    progress = Progress(100)
    progress.begin_fold("only", 100)
    results = list(train_epochs(model, SGD(), task, progress))
    assert results[-1].loss < results[0].loss / 2
    assert results[-1].accuracy == 1
