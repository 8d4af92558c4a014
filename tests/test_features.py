"""Frames, windows and their cache."""

import os
import time

import numpy as np
import pytest
import soundfile

import kernels
from npser import features, frontend
from npser.corpus import open_corpus
from npser.errors import UserError
from npser.features import LOG_FLOOR, Standardisation, WindowSet, log_magnitude, window_count
from npser.frontend import read_frames, read_versions

K = kernels.rung("cpu")


def test_log_magnitude_of_a_tone_peaks_in_its_bin():
    """A sine in the middle of bin 20 (62.5 Hz apart) has magnitude N/4 there under a Hann window, N/8 beside it."""
    t = np.arange(4096)
    frames = log_magnitude(K, np.sin(2 * np.pi * 20 * t / 256).astype(np.float32))
    assert frames.shape == (1 + (4096 - 256) // 128, 128)
    assert frames.dtype == np.float32
    np.testing.assert_allclose(frames[:, 20], np.log(64), rtol=1e-4)
    np.testing.assert_allclose(frames[:, [19, 21]], np.log(32), rtol=1e-4)
    np.testing.assert_allclose(frames[:, 40:], LOG_FLOOR, atol=1e-6)


def test_standardisation_is_of_the_frames_given_and_survives_a_constant_bin():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 2, (50, 128)).astype("f"), rng.normal(3, 2, (70, 128)).astype("f")
    a[:, 5] = b[:, 5] = 1.25
    scale = Standardisation.of([a, b])
    both = np.concatenate([scale.apply(a), scale.apply(b)])
    rest = np.delete(np.arange(128), 5)
    np.testing.assert_allclose(both.mean(axis=0)[rest], 0, atol=1e-5)
    np.testing.assert_allclose(both.std(axis=0)[rest], 1, atol=1e-5)
    np.testing.assert_allclose(both[:, 5], 0, atol=1e-3)


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (128, 1), (135, 1), (136, 2), (144, 3), (151, 3)])
def test_window_count(frames, expected):
    assert window_count(frames, 128, 8) == expected


def test_windows_are_slices_and_short_utterances_end_in_standardised_silence():
    rng = np.random.default_rng(1)
    long, short = rng.normal(size=(150, 128)).astype("f"), rng.normal(size=(100, 128)).astype("f")
    scale = Standardisation.of([long])
    windows = WindowSet([long, short], scale, 128, 8)
    assert windows.owner.tolist() == [0, 0, 0, 1]
    assert windows.start.tolist() == [0, 8, 16, 0]
    batch = windows.batch(np.array([2, 3]))
    assert batch.shape == (2, 128, 128)
    np.testing.assert_array_equal(batch[0], scale.apply(long[16:144]))
    np.testing.assert_array_equal(batch[1, :100], scale.apply(short))
    silence = scale.apply(np.full((28, 128), LOG_FLOOR, np.float32))
    np.testing.assert_array_equal(batch[1, 100:], silence)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "npser"


def test_frames_are_kept_and_read_again_only_when_something_changed(tones, cache, monkeypatch):
    corpus = open_corpus(str(tones))
    first = read_frames(corpus, "cpu", threads=2)
    assert len(list(cache.iterdir())) == 1

    def refuse(*_):
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(features, "log_magnitude", refuse)
        again = read_frames(corpus, "cpu")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))

    monkeypatch.setattr(features, "FLOOR", 1e-2)
    changed = read_frames(corpus, "cpu")
    assert min(frames.min() for frames in changed) > min(frames.min() for frames in first)
    assert len(list(cache.iterdir())) == 2


def test_a_touched_file_and_a_damaged_cache_are_read_anew(tmp_path, cache):
    rng = np.random.default_rng(0)
    for emotion in ("anger", "sadness"):
        (tmp_path / "c" / emotion).mkdir(parents=True)
        soundfile.write(tmp_path / "c" / emotion / "a.wav", 0.1 * rng.standard_normal(5000), 16000)
    before = read_frames(open_corpus(str(tmp_path / "c")), "cpu")
    (kept,) = cache.iterdir()
    kept.write_bytes(b"damaged")
    again = read_frames(open_corpus(str(tmp_path / "c")), "cpu")
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    soundfile.write(tmp_path / "c" / "anger" / "a.wav", 0.1 * rng.standard_normal(6000), 16000)
    after = read_frames(open_corpus(str(tmp_path / "c")), "cpu")
    assert len(after[0]) > len(before[0])
    np.testing.assert_array_equal(after[1], before[1])


def test_frames_that_nobody_uses_any_more_are_removed_when_others_are_kept(tones, cache):
    corpus = open_corpus(str(tones))
    days = 24 * 3600
    for speed in (1.0, 1.1):
        read_frames(corpus, "cpu", speed=speed)
    long_ago = time.time() - (frontend.UNUSED + 1) * days
    other = cache / "emodb.sha256"
    other.touch()
    for path in cache.iterdir():
        os.utime(path, (long_ago, long_ago))
    read_frames(corpus, "cpu")  # is used now
    used = {path for path in cache.iterdir() if path.stat().st_mtime > long_ago + days}
    assert len(used) == 1
    read_frames(corpus, "cpu", speed=0.9)
    assert used | {other} < set(cache.iterdir())
    assert len(list(cache.iterdir())) == 3


def test_what_another_decoder_reads_is_read_anew(tones, cache, monkeypatch):
    read_frames(open_corpus(str(tones)), "cpu")
    monkeypatch.setattr(frontend, "_decoder", lambda: "another")
    read_frames(open_corpus(str(tones)), "cpu")
    assert len(list(cache.iterdir())) == 2


def test_an_unwritable_cache_is_done_without(tones, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(read_frames(open_corpus(str(tones)), "cpu")) == 14


def test_an_unusable_recording_is_named(tmp_path, cache):
    for emotion in ("anger", "sadness"):
        (tmp_path / "c" / emotion).mkdir(parents=True)
        soundfile.write(tmp_path / "c" / emotion / "a.wav", np.zeros(5000), 16000)
    with pytest.raises(UserError, match=r"anger/a\.wav"):
        read_frames(open_corpus(str(tmp_path / "c")), "cpu", threads=2)
    assert not cache.exists()


def test_a_recording_played_faster_is_shorter_and_higher(tones, cache, tmp_path):
    corpus = open_corpus(str(tones))
    plain, faster = read_versions(corpus, "cpu", 1, (1.25,))
    for before, after in zip(plain, faster, strict=True):
        assert abs(len(before) / len(after) - 1.25) < 0.02
        low, high = (frames[5:-5].mean(axis=0)[2:60].argmax() + 2 for frames in (before, after))
        assert abs(high - 1.25 * low) < 1.5  # bins, which are whole numbers
    assert len(list(cache.iterdir())) == 2


def test_the_shortest_recording_fills_a_frame_at_every_speed(tmp_path, cache):
    for emotion in ("anger", "sadness"):
        (tmp_path / "c" / emotion).mkdir(parents=True)
        soundfile.write(tmp_path / "c" / emotion / "a.wav", np.sin(np.arange(260)), 16000)
    for frames in read_versions(open_corpus(str(tmp_path / "c")), "cpu", 1, (1.25, 0.5)):
        assert all(len(x) >= 1 for x in frames)
