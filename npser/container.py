"""Whether a file holds what its container promises: libsndfile decodes what is there, and says nothing of the rest.

RIFF, RIFX, RF64 (WAV), FORM (AIFF)   the chunk of samples says its length
W64, AU                               so does theirs
Ogg (Vorbis, Opus)                    the last page says that it is the last
MP3                                   its frames are counted: libsndfile guesses their number where no index says it
"""

import mmap
import os
import struct
from typing import BinaryIO

_STREAMED = 0x7FFF0000  # programs that write into a pipe cannot know a length: they put (nearly) the largest one there
_PAGE = 27 + 255 + 255 * 255  # the largest of Ogg

_KILOBITS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)


def is_cut_off(path: str | bytes) -> bool:
    """Whether the file ends before its samples do, as far as its container tells."""
    try:
        return _is_cut_off(path)
    except struct.error:  # within a header
        return True


def _is_cut_off(path: str | bytes) -> bool:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        kind = file.read(12)[:4]
        if kind in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
            return _chunks_are_cut_off(file, kind, size)
        if kind == b"riff":
            return _w64_is_cut_off(file, size)
        if kind == b".snd":
            file.seek(4)
            start, length = struct.unpack(">II", file.read(8))
            return length < _STREAMED and start + length > size
        return kind == b"OggS" and not _ogg_has_an_end(file, size)


def _chunks_are_cut_off(file: BinaryIO, kind: bytes, size: int) -> bool:
    order = "<" if kind in (b"RIFF", b"RF64") else ">"
    long = 0  # RF64: the length that 32 bits cannot say
    while len(header := file.read(8)) == 8:
        length = struct.unpack(order + "I", header[4:])[0]
        if header[:4] == b"ds64" and length >= 16:
            long = struct.unpack("<8xQ", file.read(16))[0]
            length -= 16
        if header[:4] in (b"data", b"SSND"):
            if kind == b"RF64" and length >= _STREAMED:
                return file.tell() + long > size
            return file.tell() + length > size and length < _STREAMED
        file.seek(length + length % 2, os.SEEK_CUR)  # chunks start at even offsets
    return False


def _w64_is_cut_off(file: BinaryIO, size: int) -> bool:
    file.seek(40)  # behind the identifiers of the file and of its form, 16 bytes each, and its length
    while len(header := file.read(24)) == 24:
        length = struct.unpack("<Q", header[16:])[0]  # with these 24 bytes
        if header[:4] == b"data":
            return file.tell() - 24 + length > size and length < 1 << 62
        if not 24 <= length <= size:
            return True
        file.seek(-(-length // 8) * 8 - 24, os.SEEK_CUR)  # chunks start at multiples of 8
    return False


def _ogg_has_an_end(file: BinaryIO, size: int) -> bool:
    file.seek(max(size - _PAGE, 0))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:  # the flag of the last page
        return False
    return len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def mp3_samples(path: str | bytes) -> tuple[int, bool]:
    """How many samples the frames of an MP3 file hold, per channel, 0 where they cannot be counted; whether an index in
    its first frame says so, too."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, samples, like, indexed = 0, 0, None, False
        while 0 <= at <= len(data) - 4:
            frame = _mp3_frame(data[at : at + 4])
            if frame and like in (None, frame[1:]) and _continues(data, at + frame[0], frame[1:]):
                if like is None:
                    head = data[at : at + 40]
                    indexed = b"Xing" in head or b"Info" in head
                at, samples, like = at + frame[0], samples + frame[1], frame[1:]
            elif data[at : at + 3] == b"ID3" and at + 10 <= len(data):  # a tag, 7 bits of its length in each byte
                a, b, c, d = data[at + 6 : at + 10]
                at += 10 + (a << 21 | b << 14 | c << 7 | d)
            else:
                at = data.find(b"\xff", at + 1)
    return samples, indexed


def _mp3_frame(header: bytes) -> tuple[int, int, int] | None:
    """(bytes, samples, rate) of the frame of layer III that this header begins; None where it begins none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version = {3: 1, 2: 2, 0: 4}.get(header[1] >> 3 & 3)  # 1, 2 and 2.5: the rates are so many times lower
    kilobits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version is None or not 0 < kilobits < 15 or rate == 3:
        return None
    hertz, samples = _RATES[rate] // version, 1152 if version == 1 else 576
    bits = 1000 * _KILOBITS[min(version, 2)][kilobits]
    return samples // 8 * bits // hertz + (header[2] >> 1 & 1), samples, hertz


def _continues(data: mmap.mmap, at: int, like: tuple[int, int]) -> bool:
    """Whether a frame of that kind, a tag or the end of the file is there: other bytes may look like a header, too."""
    frame = _mp3_frame(data[at : at + 4])
    if frame is not None:
        return frame[1:] == like
    return at + 4 > len(data) or data[at : at + 3] in (b"ID3", b"TAG", b"APE")
