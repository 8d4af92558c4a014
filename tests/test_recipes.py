"""Recipes: what they say of themselves, and that each of their fields does what its comment says."""

import io
from dataclasses import fields, replace

import numpy as np
import pytest

from npser.augment import AugmentedWindows
from npser.errors import UserError
from npser.features import LOG_FLOOR, Standardisation, WindowSet
from npser.models import build_model
from npser.optim import SGD
from npser.progress import Progress
from npser.recipes import RECIPES, Recipe, as_settings, changed, describe, from_settings, recipe_for
from npser.trainer import Checkpoint, Task, fit, steps_per_epoch, train_epochs

FLAT = Standardisation(np.zeros(128, np.float32), np.ones(128, np.float32))
RNG = np.random.default_rng(5)
UTTERANCES = [RNG.normal(0, 2, (n, 128)).astype(np.float32) for n in (90, 140, 200)]


def progress():
    made = Progress(1000, io.StringIO())
    made.begin_fold("fold", 1000)
    return made


# --- as data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("arch", ["cnn", "lstm", "tdcnn"])
def test_a_recipe_survives_the_configuration(name, arch):
    recipe = RECIPES[name][arch]
    assert from_settings(as_settings(recipe)) == recipe
    assert changed(Recipe(), dict(part.split("=", 1) for part in describe(recipe).split())) == recipe


def test_what_is_given_wins_over_the_recipe_and_over_the_demo():
    assert recipe_for("best", "lstm", True, {"epochs": 77}).epochs == 77
    assert recipe_for("paper", "cnn", True, {}).batch_size == 16
    assert recipe_for("paper", "cnn", False, {}) == RECIPES["paper"]["cnn"]


def test_the_paper_recipe_adds_nothing_to_the_paper_but_clipping():
    plain = Recipe()
    free = {"epochs", "segment_hop", "batch_size", "standardisation", "clip_norm"}
    for recipe in RECIPES["paper"].values():
        assert all(getattr(recipe, f.name) == getattr(plain, f.name) for f in fields(Recipe) if f.name not in free)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("epoch", "3"), ("epochs", "three"), ("moving", "yes"), ("speeds", "1;2")),
        *(("epochs", "0"), ("segment_hop", "0"), ("batch_size", "-3"), ("share_windows", "0"), ("average_last", "0")),
        *(
            ("standardisation", "Global"),
            ("clip_norm", "0"),
            ("clip_norm", "nan"),
            ("final_rate", "1.1"),
            ("label_smoothing", "1"),
            ("speeds", "0"),
        ),
    ],
)
def test_an_unknown_field_or_value_is_refused(name, text):
    with pytest.raises(UserError, match=name):
        changed(Recipe(), {name: text})


# --- training ----------------------------------------------------------------------------------------------------


def small_task(**settings):
    recipe = Recipe(**{"epochs": 4, "batch_size": 3, "segment_hop": 20, **settings})
    windows = WindowSet(UTTERANCES, FLAT, 128, recipe.segment_hop)
    return Task.of(windows, np.array([0, 1, 2])[windows.owner], (1, 2, 3), recipe)


def small_model():
    return build_model("lstm", hidden=4, classes=3, seed=1)


def test_the_rate_falls_linearly_to_its_share():
    sgd = SGD(lr=0.5, decay=0, final_rate=0.1, total=10)
    rates = []
    for sgd.updates in range(13):
        rates.append(sgd.rate)
    np.testing.assert_allclose(rates[:11], np.linspace(0.5, 0.05, 11))
    np.testing.assert_allclose(rates[11:], 0.05)


def test_training_follows_every_field_of_a_recipe():
    task = small_task(clip_norm=0.01, final_rate=0.1, epochs=3)
    sgd = task.optimiser()
    assert (sgd.clip_norm, sgd.final_rate, sgd.total) == (0.01, 0.1, 3 * steps_per_epoch(task.targets, 3))
    model = small_model()
    fit(model, task, progress())

    def weights(**changes):
        other = small_model()
        fit(other, small_task(**{"clip_norm": 0.01, "final_rate": 0.1, "epochs": 3, **changes}), progress())
        return np.concatenate([value.ravel() for value in other.params.values()])

    same = weights()
    np.testing.assert_array_equal(same, np.concatenate([value.ravel() for value in model.params.values()]))
    changes = {"clip_norm": None, "final_rate": 1.0, "epochs": 2, "batch_size": 4, "segment_hop": 10, "average_last": 2}
    changes |= {"label_smoothing": 0.1}
    for name, value in changes.items():
        other = weights(**{name: value})
        assert not np.array_equal(other, same), name
    told = {"epochs": 3, "batch_size": 4, "clip_norm": 0.01, "final_rate": 0.1, "average_last": 2, "share_windows": 2}
    told |= {"label_smoothing": 0.2}
    task = small_task(**told)
    assert {name: getattr(task, name) for name in told} == told
    assert told.keys() == {f.name for f in fields(Recipe)} & {f.name for f in fields(Task)}


def test_standardisation_is_of_every_bin_or_of_all_together():
    everything = np.concatenate(UTTERANCES).astype(np.float64)
    for kind, axis in (("bin", 0), ("global", None)):
        scale = Standardisation.of(UTTERANCES, kind)
        np.testing.assert_allclose(scale.mean, np.broadcast_to(everything.mean(axis), 128), atol=1e-5)
        np.testing.assert_allclose(scale.deviation, np.broadcast_to(everything.std(axis), 128), rtol=1e-5)


def test_the_weights_are_the_mean_of_the_last_epochs():
    task, seen = small_task(average_last=3), []
    plain = small_model()
    for _ in train_epochs(plain, SGD(), replace(task, average_last=1), progress()):
        seen.append({name: value.copy() for name, value in plain.params.items()})
    model = small_model()
    fit(model, task, progress())
    for name, value in model.params.items():
        np.testing.assert_allclose(value, np.mean([params[name] for params in seen[1:]], axis=0), rtol=1e-4, atol=1e-6)
        assert not np.array_equal(value, seen[-1][name])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_training_averages_and_slows_down_as_if_it_had_not_been(tmp_path, stop):
    task = small_task(average_last=3, final_rate=0.1)
    whole = small_model()
    fit(whole, task, progress())

    class Stopped(Exception):
        pass

    class UntilThen(Checkpoint):
        def save(self, model, sgd, done, mean=None):
            taken = super().save(model, sgd, done, mean)
            if len(done) == stop:
                raise Stopped
            return taken

    with pytest.raises(Stopped):
        fit(small_model(), task, progress(), UntilThen(tmp_path / "c.npz", "x", progress()))
    resumed = small_model()
    fit(resumed, task, progress(), Checkpoint(tmp_path / "c.npz", "x", progress()))
    for name, value in resumed.params.items():
        np.testing.assert_array_equal(value, whole.params[name])


# --- augmentation ------------------------------------------------------------------------------------------------


def augmented(versions=(UTTERANCES,), **settings):
    return AugmentedWindows(versions, FLAT, 128, Recipe(segment_hop=8, **settings))


def test_an_epoch_keeps_its_windows_and_each_lies_within_its_utterance():
    faster = [x[: len(x) * 3 // 4] for x in UTTERANCES]
    windows = augmented((UTTERANCES, faster), speeds=(4 / 3,), moving=True)
    lengths = set()
    for seed in range(20):
        frames, rows = windows.epoch(np.random.default_rng(seed))
        assert len(rows) == len(windows) == 1 + 2 + 10
        ends = np.cumsum([max(128, n) for n in _lengths(frames, windows)])
        first = np.concatenate([[0], ends[:-1]])
        assert np.all(rows >= first[windows.owner])
        assert np.all(rows + 128 <= ends[windows.owner])
        lengths.add(len(frames))
    assert len(lengths) == 4  # of two utterances that are longer than a window, each at one of two speeds


def _lengths(frames, windows):
    """The lengths of the utterances that an epoch's frames were put together of."""
    at = 0
    for number in range(len(windows.first)):
        for version in windows.versions:
            x = version[number]
            padded = np.pad(x, ((0, max(128 - len(x), 0)), (0, 0)), constant_values=LOG_FLOOR)
            if len(frames) >= at + len(padded) and np.array_equal(frames[at : at + len(padded)], padded):
                yield len(padded)
                at += len(padded)
                break
        else:
            raise AssertionError("not the frames of an utterance at any speed")
    assert at == len(frames)


def test_the_same_generator_draws_the_same_epoch_and_another_one_another():
    windows = augmented(moving=True)
    one, again, other = (windows.epoch(np.random.default_rng(seed))[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_windows_move_over_all_places():
    windows = augmented(moving=True)
    places = {int(row - 268) for seed in range(200) for row in windows.epoch(np.random.default_rng(seed))[1][-10:]}
    assert places == set(range(200 - 128 + 1))  # frames 268 on are those of the third utterance


def test_without_augmentation_every_epoch_reads_the_same_frames():
    windows = WindowSet(UTTERANCES, FLAT, 128, 8)
    frames, rows = windows.epoch(np.random.default_rng(0))
    assert frames is windows.everything
    assert rows is windows.rows


def test_an_epoch_keeps_its_number_of_windows_and_testing_knows_nothing_of_augmentation():
    plain, windows = WindowSet(UTTERANCES, FLAT, 128, 8), augmented(moving=True)
    np.testing.assert_array_equal(plain.owner, windows.owner)
    assert not hasattr(windows, "recordings")  # what `evaluate` scores
