"""Scoring whole recordings with shared work gives what scoring window by window gives."""

import numpy as np
import pytest

from npser import inference
from npser.features import LOG_FLOOR, Standardisation, WindowSet
from npser.inference import window_probabilities
from npser.models import build_model


def recordings(bins, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(LOG_FLOOR / 2, 1, (n, bins)).astype(np.float32) for n in lengths]


def window_set(model, lengths, hop):
    bins = model.settings["bins"]
    frames = recordings(bins, lengths)
    return WindowSet(frames, Standardisation.of(frames), model.input_frames, hop)


def one_by_one(model, windows):
    return model.predict_proba(windows.batch(np.arange(len(windows))))


def awake(model):
    """Weights large enough that the classes' probabilities differ from window to window."""
    rng = np.random.default_rng(1)
    model.set_params({name: rng.standard_normal(value.shape) for name, value in model.params.items()})
    return model


@pytest.mark.parametrize("arch", ["cnn", "lstm", "tdcnn"])
@pytest.mark.parametrize("bins", [16, 18, 8, 4])  # shared; not a multiple of 4; all edge; shorter than an edge
@pytest.mark.parametrize("hop", [1, 4, 6, 8, 40])
def test_shared_equals_separate(arch, bins, hop):
    model = awake(build_model(arch, backend="reference", dtype="float64", filters=3, hidden=5, bins=bins))
    windows = window_set(model, (5, 60, 83, model.input_frames, 41), hop)
    expected = one_by_one(model, windows)
    assert expected.std(axis=0).max() > 1e-5
    np.testing.assert_allclose(window_probabilities(model, windows.recordings()), expected, atol=1e-10)


@pytest.mark.parametrize("arch", ["cnn", "lstm", "tdcnn"])
def test_shared_equals_separate_at_the_papers_sizes(arch):
    model = build_model(arch, seed=3)
    windows = window_set(model, (100, 290), 8)
    np.testing.assert_allclose(window_probabilities(model, windows.recordings()), one_by_one(model, windows), atol=1e-5)


@pytest.mark.parametrize("arch", ["cnn", "lstm", "tdcnn"])
def test_any_grouping_gives_the_same(arch, monkeypatch):
    model = awake(build_model(arch, backend="reference", dtype="float64", filters=2, hidden=4, bins=16))
    windows = window_set(model, (90, 30, 200), 4)
    expected = window_probabilities(model, windows.recordings())
    for together in (1, 7):
        monkeypatch.setattr(inference, "TOGETHER", together)
        np.testing.assert_allclose(window_probabilities(model, windows.recordings()), expected, atol=1e-12)


def test_convolutions_run_once_over_a_recording(monkeypatch):
    """At a hop of 8, the blocks see each frame about once, and 16 frames of edges a window."""
    model = build_model("cnn", backend="reference", filters=1, hidden=2, bins=64)
    windows = window_set(model, (64 + 8 * 19,), 8)
    convolutions, seen = model.layers.layers[0], []
    infer = convolutions.infer

    def counting(x):
        seen.append(x.shape[0] * x.shape[1])
        return infer(x)

    monkeypatch.setattr(convolutions, "infer", counting)
    window_probabilities(model, windows.recordings())
    assert len(windows) == 20
    assert sum(seen) == 64 + 8 * 19 + 20 * 16


def test_the_features_of_one_long_recording_are_not_copied():
    x = np.ones((3, 2), np.float32)
    assert inference._stacked([x]) is x
    assert inference._stacked([x, x]).shape == (6, 2)
