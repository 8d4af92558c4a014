"""Files that end too early, and MP3 files that libsndfile would read in part: refused by name, in every container."""

import numpy as np
import pytest
import soundfile

from npser.audio import open_recording
from npser.container import mp3_samples
from npser.errors import UserError

RATE = 16000
TIME = np.arange(4 * RATE) / RATE
SWEEP = 0.3 * np.sin(2 * np.pi * (200 + 300 * TIME) * TIME) + 0.02 * np.random.default_rng(0).standard_normal(len(TIME))

CONTAINERS = [
    ("a.wav", "WAV", "PCM_16"), ("b.wav", "RF64", "PCM_16"), ("a.w64", "W64", "PCM_16"), ("a.au", "AU", "PCM_16"),
    ("a.aiff", "AIFF", "PCM_16"), ("a.ogg", "OGG", "VORBIS"), ("a.opus", "OGG", "OPUS"), ("a.flac", "FLAC", "PCM_16"),
    ("a.mp3", "MP3", "MPEG_LAYER_III"),
]  # fmt: skip


def write(path, kind, coding):
    if kind not in soundfile.available_formats() or coding not in soundfile.available_subtypes(kind):
        pytest.skip(f"this libsndfile writes no {kind} with {coding}")
    soundfile.write(path, SWEEP, RATE, format=kind, subtype=coding)
    return path


@pytest.mark.parametrize("content", [b".sndxx", b"RF64\xff\xff\xff\xffWAVEds64\x1c\0\0\0cut", b"OggS"])
def test_a_header_that_is_cut_short_is_refused(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.wav: truncated"):
        open_recording(tmp_path / "a.wav")


@pytest.mark.parametrize(("name", "kind", "coding"), CONTAINERS)
def test_half_a_file_is_refused_and_a_whole_one_is_not(tmp_path, name, kind, coding):
    path = write(tmp_path / name, kind, coding)
    assert open_recording(path).length == len(SWEEP)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"truncated|lost sync"):
        open_recording(path)


@pytest.fixture
def mp3(tmp_path):
    """An MP3 file with an index, its bytes, and the place behind its first frame, which is the index."""
    path = write(tmp_path / "a.mp3", "MP3", "MPEG_LAYER_III")
    content = path.read_bytes()
    first = content.index(b"\xff", content.index(b"Info") if b"Info" in content[:200] else content.index(b"Xing"))
    while content[first : first + 2] != content[:2]:
        first = content.index(b"\xff", first + 1)
    return path, content, first


def test_an_mp3_file_is_counted(mp3):
    path, _, _ = mp3
    samples, indexed = mp3_samples(str(path))
    assert indexed
    assert 0 <= samples - len(SWEEP) <= 4 * 576  # an index, and what the encoder puts before and behind


def test_joined_mp3_files_are_not_read_in_part(mp3):
    path, content, _ = mp3
    path.write_bytes(content + content)
    with pytest.raises(UserError, match=r"64000 of \d+ samples would be read: convert it to WAV"):
        open_recording(path)


def test_an_mp3_file_without_an_index(mp3):
    """Whatever libsndfile guesses, it is read whole or not at all."""
    path, content, first = mp3
    path.write_bytes(content[first:])
    samples, indexed = mp3_samples(str(path))
    assert not indexed
    if samples - soundfile.info(path).frames <= 4 * 1152:
        assert samples - open_recording(path).length <= 4 * 1152
    else:
        with pytest.raises(UserError, match="does not say how long it is"):
            open_recording(path)


def test_an_mp3_file_with_a_large_tag_is_whole(mp3):
    """The guess at its length takes the tag for sound."""
    path, content, first = mp3
    size = 60_000
    tag = b"ID3\x04\x00\x00" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(size)
    path.write_bytes(tag + content[first:])
    samples, _ = mp3_samples(str(path))
    assert abs(open_recording(path).length - samples) <= 4 * 1152


@pytest.mark.parametrize("junk", [b"", b"\xff", b"\xff\xfb", b"ID3", b"\xff\xfb\x90\x00" * 3, bytes(5000)])
def test_what_is_no_mp3_file_has_no_samples(tmp_path, junk):
    path = tmp_path / "x.mp3"
    path.write_bytes(junk + b"-")
    headers = junk.startswith(b"\xff\xfb\x90\x00")  # of frames; the first is all that fits in
    assert mp3_samples(str(path)) == (1152 if headers else 0, False)
