"""Reading recordings block by block: the same samples as from the whole file."""

import math

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from npser import audio
from npser.audio import SAMPLE_RATE, open_recording, read_audio, resampled
from npser.errors import UserError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK", 1000)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000, 12345])
def test_resampling_in_blocks_is_bit_for_bit_that_of_the_whole(rate):
    rng = np.random.default_rng(rate)
    for size in (1, 700, 30_011):
        x = rng.standard_normal(size)
        cuts = np.sort(rng.integers(0, size + 1, 17))
        common = math.gcd(rate, SAMPLE_RATE)
        whole = resample_poly(x, SAMPLE_RATE // common, rate // common)
        np.testing.assert_array_equal(np.concatenate(list(resampled(np.split(x, cuts), rate))), whole)


def test_blocks_of_a_resampled_recording_are_bounded():
    """Otherwise `resampled` could wait for the end and still pass."""
    blocks = [np.ones(1000)] * 500
    assert max(map(len, resampled(blocks, 44100))) < 20_000
    assert max(map(len, resampled(blocks, 8000))) < 20_000


@pytest.mark.parametrize(("rate", "channels", "gain"), [(16000, 1, 0.1), (44100, 2, 0.1), (48000, 1, 3.0)])
def test_a_recording_in_blocks_equals_the_whole_file(tmp_path, rate, channels, gain):
    x = gain * np.random.default_rng(1).standard_normal((rate, channels))
    soundfile.write(tmp_path / "a.wav", x, rate, subtype="FLOAT")
    recording = open_recording(tmp_path / "a.wav")
    blocks = list(recording.samples())
    whole = read_audio(tmp_path / "a.wav")
    assert len(blocks) > 3
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert recording.length == len(whole) == SAMPLE_RATE
    assert recording.seconds == 1.0


def test_what_is_wrong_in_the_middle_of_a_recording_is_found_before_it_is_used(tmp_path):
    x = np.random.default_rng(1).uniform(-0.5, 0.5, 40_000)
    x[30_000] = np.nan
    soundfile.write(tmp_path / "a.wav", x, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"a\.wav: holds samples that are not finite"):
        open_recording(tmp_path / "a.wav")
