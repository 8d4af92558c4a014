"""Votes, oversampling, clipping and progress: what stands around the networks."""

import io

import numpy as np
import pytest

from npser.crossval import make_folds
from npser.features import Standardisation, WindowSet
from npser.foldresult import EpochResult
from npser.models import build_model
from npser.optim import SGD, Gradients
from npser.progress import Progress, duration
from npser.synthetic import demo_corpus
from npser.trainer import Task, steps_per_epoch, train_epochs, vote

FLAT = Standardisation(np.zeros(128, np.float32), np.ones(128, np.float32))


def utterance(windows):
    """The frames of an utterance that has so many windows, one every 8 frames."""
    return np.zeros((128 + 8 * (windows - 1), 128), np.float32)


def test_sum_and_majority_decide_as_worked_out_by_hand():
    # First: two windows of three lean to class 1, one is sure of class 0. Second: a draw, decided by the sum.
    p = np.array([[0.9, 0.05, 0.05], [0.4, 0.5, 0.1], [0.4, 0.5, 0.1], [0.6, 0.1, 0.3], [0.0, 0.9, 0.1]])
    votes = vote(p, np.array([0, 0, 0, 1, 1]))
    np.testing.assert_allclose(votes.probabilities[0], [1.7 / 3, 1.05 / 3, 0.25 / 3], rtol=1e-6)
    np.testing.assert_allclose(votes.probabilities[1], [0.3, 0.5, 0.2], rtol=1e-6)
    assert votes.probabilities.argmax(axis=1).tolist() == [0, 1]
    assert votes.majority.tolist() == [1, 1]


def test_epoch_holds_every_window_and_as_many_of_each_class():
    windows = WindowSet([utterance(n) for n in (5, 2, 1)], FLAT, 128, 8)
    targets = np.array([0, 1, 2])[windows.owner]
    task = Task(windows, targets, (0, 0, 0), 1, 4)
    chosen = np.concatenate(task.oversampled())
    assert np.bincount(targets[chosen]).tolist() == [5, 5, 5]
    assert set(chosen.tolist()) == set(range(8))
    assert steps_per_epoch(targets, 4) == 4  # 15 windows in batches of 4


def test_an_epoch_reports_the_mean_loss_and_accuracy_of_its_windows(monkeypatch):
    model = build_model("lstm", hidden=4, classes=3, seed=1)
    rng = np.random.default_rng(0)
    frames = [rng.normal(size=(len(utterance(n)), 128)).astype(np.float32) for n in (4, 5, 2)]
    windows = WindowSet(frames, FLAT, 128, 8)
    seen, train_batch = [], model.train_batch

    def watched(x, y, sgd, *rest):
        loss, p = train_batch(x, y, sgd, *rest)
        seen.append((loss * len(y), (p.argmax(axis=1) == y).sum(), len(y)))
        return loss, p

    monkeypatch.setattr(model, "train_batch", watched)
    task = Task(windows, np.array([0, 1, 2])[windows.owner], (0, 0, 0), epochs=1, batch_size=4)
    progress = Progress(total=4, stream=io.StringIO())
    progress.begin_fold("fold 0.0", 4)
    (result,) = train_epochs(model, SGD(), task, progress)
    loss, right, count = np.sum(seen, axis=0)
    assert count == 15
    assert 0 < right < count
    np.testing.assert_allclose([result.loss, result.accuracy], [loss / count, right / count])


def test_no_test_utterance_is_in_training():
    corpus = demo_corpus()
    for fold in make_folds(corpus, "stratified", 3, 2, 0) + make_folds(corpus, "speaker", 10, 1, 0):
        assert not set(fold.train) & set(fold.test)
        assert len(fold.train) + len(fold.test) == len(corpus.utterances)
    by_speaker = make_folds(corpus, "speaker", 10, 1, 0)
    for fold in by_speaker:
        speakers = [{corpus.utterances[i].speaker for i in part} for part in (fold.train, fold.test)]
        assert len(speakers[1]) == 1
        assert not speakers[0] & speakers[1]


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_clipping_scales_all_gradients_by_one_factor(clip):
    rng = np.random.default_rng(0)
    model = build_model("lstm", backend="reference", hidden=4, bins=8, classes=3, dtype="float64")
    x, y = rng.normal(size=(5, 8, 8)), np.array([0, 1, 2, 0, 1])
    _, grads = model.loss_and_grads(x, y)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert 0.01 < norm < 1e9
    before = {name: value.copy() for name, value in model.params.items()}
    model.train_step(x, y, SGD(lr=0.1, momentum=0, decay=0, clip_norm=clip))
    for name, value in model.params.items():
        np.testing.assert_allclose(
            value, before[name] - 0.1 * grads[name] * min(1, clip / norm), rtol=1e-10, atol=1e-14
        )


def test_gradients_sink_changes_nothing():
    model = build_model("lstm", backend="reference", hidden=4, bins=8, classes=3, dtype="float64")
    before = {name: value.copy() for name, value in model.params.items()}
    _, grads = model.loss_and_grads(np.ones((2, 8, 8)), np.array([0, 1]))
    assert set(grads) == set(before)
    assert all(np.array_equal(before[name], value) for name, value in model.params.items())
    assert Gradients().arrays == {}


# --- progress ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_time_left_counts_what_is_left_and_not_what_was_done_before():
    out = io.StringIO()
    progress = Progress(total=100, stream=out)
    progress.begin_fold("fold 0.0", 50)
    progress.skip(40)  # an earlier start did these
    for _ in range(6):
        progress.step(seconds=2.0, windows=32, loss=1.0, accuracy=0.5, epoch=1, epochs=2)
    assert "about 1 min 52 s for all of it (2000 ms an update, measured on 3 of them)" in out.getvalue()
    progress.epoch_done(EpochResult(1, 0.5, 0.75, 10.0), 2, 320)
    # 54 updates are left, 4 of them in this fold; the fold's first update was not timed, but took its place
    wanted = (
        "fold 0.0  epoch 1/2  loss 0.5000  training accuracy  75.0 %     32 windows/s  left: fold 8.0 s, run 1 min 48 s"
    )
    assert wanted in out.getvalue()


def test_a_pause_of_the_program_hardly_lengthens_the_time_left():
    out = io.StringIO()
    progress = Progress(total=1000, stream=out)
    progress.begin_fold("fold 0.0", 1000)
    for seconds in [2.0] * 101 + [36000.0]:
        progress.step(seconds, windows=32, loss=1.0, accuracy=0.5, epoch=1, epochs=1)
    progress.epoch_done(EpochResult(1, 0.5, 0.75, 10.0), 2, 320)
    # 100 updates of 2 s and one that counts as 40: 898 are left
    assert "run 35 min 34 s" in out.getvalue()


def test_live_line_on_a_terminal_is_rewritten_and_plain_elsewhere():
    for stream, live in ((Terminal(), True), (io.StringIO(), False)):
        clock = iter(np.arange(0, 100, 0.5))
        progress = Progress(total=10, stream=stream, clock=lambda clock=clock: float(next(clock)))
        progress.begin_fold("fold 0.0", 10)
        for _ in range(3):
            progress.step(0.1, 32, 1.0, 0.5, 1, 1)
        assert ("\r\x1b[K" in stream.getvalue()) == live
        assert ("epoch 1/1" in stream.getvalue()) == live


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
