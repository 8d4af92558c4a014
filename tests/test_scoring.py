"""Windows of a recording scored piece by piece: the same windows, and the same votes, as in cross-validation."""

import numpy as np
import pytest

import kernels
from npser.errors import UserError
from npser.features import LOG_FLOOR, Standardisation, WindowSet, log_magnitude
from npser.inference import window_probabilities
from npser.models import build_model
from npser.scoring import frame_blocks, score
from npser.trainer import evaluate


@pytest.fixture(scope="module")
def model():
    model = build_model("lstm", hidden=4, seed=2)
    model.scale = Standardisation(np.linspace(-6, -4, 128, dtype=np.float32), np.full(128, 2, np.float32))
    return model


def frames(count):
    return np.random.default_rng(count).normal(-5, 2, (count, 128)).astype(np.float32)


def blocks(x, seed=0):
    return np.split(x, np.sort(np.random.default_rng(seed).integers(0, len(x) + 1, 7)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_frames_in_blocks_equal_those_of_the_whole(backend):
    k = kernels.rung(backend)
    x = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000).astype(np.float32)
    made = np.concatenate(list(frame_blocks(k, blocks(x))))
    np.testing.assert_allclose(made, log_magnitude(k, x), atol=2e-6)


@pytest.mark.parametrize("hop", [1, 16, 128, 200])
@pytest.mark.parametrize("count", [128, 129, 500, 1003])
def test_pieces_together_are_all_windows(model, hop, count):
    x = frames(count)
    if hop == 1 and count > 500:
        return
    starts = hop * np.arange(1 + (count - 128) // hop)
    whole = window_probabilities(model, [(model.scale.apply(x), starts)])
    made = np.concatenate(list(score([model], blocks(x, seed=hop), hop, piece=3)))
    np.testing.assert_allclose(made, whole, atol=1e-6)


def test_a_short_recording_is_padded_as_in_training(model):
    x = frames(50)
    (p,) = score([model], [x[:20], x[20:]], 16)
    padded = np.concatenate([x, np.full((78, 128), LOG_FLOOR, np.float32)])
    np.testing.assert_allclose(p, model.predict_proba(model.scale.apply(padded)[None]), atol=1e-6)


def test_the_mean_of_the_windows_is_the_vote_of_the_evaluation(model):
    utterances = [frames(n) for n in (90, 128, 300, 777)]
    votes = evaluate(model, WindowSet(utterances, model.scale, model.input_frames, 24))
    for x, p in zip(utterances, votes.probabilities, strict=True):
        mean = np.concatenate(list(score([model], blocks(x), 24, piece=5))).mean(axis=0)
        np.testing.assert_allclose(mean, p, atol=1e-6)


def test_a_model_without_statistics_is_refused():
    with pytest.raises(UserError, match="no feature statistics"):
        list(score([build_model("lstm", hidden=4)], [frames(200)], 16))
