"""Variants of what no recipe changes: each does what its name says, and nothing else."""

import numpy as np
import pytest

from bench.variants import VARIANTS, combined, versions
from kernels import reference
from npser.corpus import open_corpus
from npser.errors import UserError
from npser.features import LOG_FLOOR, magnitude
from npser.frontend import read_versions
from npser.models import build_model


@pytest.fixture
def spectrum():
    samples = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 0.1
    samples[:1000] = 0  # frames of silence
    return magnitude(reference, samples)


def frames(name, spectrum):
    return VARIANTS[name].frames(spectrum)


def test_the_floor(spectrum):
    ours = np.log(np.maximum(spectrum, 1e-3))
    low = frames("floor-0.0001", spectrum)
    np.testing.assert_allclose((ours.min(), low.min()), (LOG_FLOOR, np.log(1e-4)), rtol=1e-6)
    np.testing.assert_allclose(np.maximum(low, LOG_FLOOR), ours, rtol=1e-6)


def test_the_cube_root_has_no_floor(spectrum):
    np.testing.assert_allclose(frames("cube-root", spectrum).astype(np.float64) ** 3, spectrum, rtol=1e-5)


def test_an_utterance_by_its_own_statistics(spectrum):
    own, centred = frames("utterance", spectrum), frames("utterance-mean", spectrum)
    np.testing.assert_allclose(own.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(own.std(axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(centred - centred[0], (log := np.log(np.maximum(spectrum, 1e-3))) - log[0], atol=1e-5)
    np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-5)


def test_noise_lies_10_to_30_db_below():
    samples = np.sin(np.arange(16000, dtype=np.float32))
    distances = []
    for seed in range(20):
        noise = VARIANTS["noise"].recording(samples, np.random.default_rng(seed)) - samples
        distances.append(10 * np.log10(np.square(samples).mean() / np.square(noise).mean()))
    assert 9.9 < min(distances) < 15
    assert 25 < max(distances) < 30.1


@pytest.mark.parametrize("arch", ["cnn", "tdcnn"])
def test_initial_weights_and_dropout(arch):
    def fresh(name):
        model = build_model(arch, backend="reference", filters=2, hidden=5, bins=8)
        VARIANTS[name].network(model)
        return model

    glorot, he = build_model(arch, backend="reference", filters=2, hidden=5, bins=8), fresh("he")
    assert np.abs(he.params["conv1.w"]).max() == pytest.approx(np.sqrt(6 / 9), rel=0.1)
    np.testing.assert_allclose(he.params["conv2.w"], glorot.params["conv2.w"] * np.sqrt(2), rtol=1e-6)
    if arch == "cnn":
        np.testing.assert_allclose(he.params["dense1.w"], glorot.params["dense1.w"] * np.sqrt(13 / 8), rtol=1e-6)
    for name in glorot.params:
        if name not in ("conv1.w", "conv2.w", "dense1.w"):
            np.testing.assert_array_equal(he.params[name], glorot.params[name])

    def drops(model):
        """Whether dropout changes anything: one batch, seen with the masks of two updates."""
        x = np.random.default_rng(1).random((4, model.input_frames, 8), np.float32)
        logits = [model.layers.forward(x, n) for n in (0, 1)]
        return bool(np.any(logits[0] != logits[1]))

    assert drops(glorot)
    assert drops(fresh("half-dropout"))
    assert drops(fresh("dense-dropout")) == (arch == "cnn")  # the tdcnn has none there, for which it is no variant


def test_versions_are_those_of_a_run_but_for_what_is_changed(tones):
    corpus = open_corpus(str(tones))
    usual = read_versions(corpus, "reference", 1, (0.9,))
    same, noisy = versions(corpus, "reference", 1, (0.9,), combined(["noise", "he"], "cnn"))
    for ours, theirs in zip([f for v in usual for f in v], [f for v in same for f in v], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [len(v) for v in noisy] == [len(corpus.utterances)]
    assert all(a.shape == b.shape and (a != b).any() for a, b in zip(usual[0], noisy[0], strict=True))
    rooted, none = versions(corpus, "reference", 1, (0.9,), VARIANTS["cube-root"])
    assert not none
    for plain, root in zip(usual, rooted, strict=True):
        for a, b in zip(plain, root, strict=True):
            np.testing.assert_allclose(np.log(np.maximum(b.astype(np.float64) ** 3, 1e-3)), a, atol=1e-4)


def test_variants_that_contradict_or_change_nothing_are_refused():
    assert combined(["noise", "he", "cube-root"], "cnn").network is VARIANTS["he"].network
    for names, said in ((["cube-root", "utterance"], "cube-root does"), (["he", "he"], "he does")):
        with pytest.raises(UserError, match=f"--variant {names[1]}: changes what {said}"):
            combined(names, "cnn")
    for name, arch in (("he", "lstm"), ("half-dropout", "lstm"), ("dense-dropout", "tdcnn")):
        with pytest.raises(UserError, match=f"--variant {name}: changes nothing of the {arch}"):
            combined([name], arch)
