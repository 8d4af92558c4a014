"""Nothing silently wrong: damaged and hostile input of every kind is used, or refused in one line. Nothing else.

    python -m pytest tests/test_fuzz.py                                   a few hundred cases
    NPSER_FUZZ=10000 python -m pytest -m slow -s tests/test_fuzz.py       so many; prints counts
    python tests/test_fuzz.py KIND FIRST COUNT                            cases by number, to repeat one

Cases run in a process of their own, which may take 2 GB more than it has after its imports, 10 s for a case, and may
write only where the case lies. A case is a function of its number.
"""

import contextlib
import io
import json
import lzma
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ROOT = Path(__file__).resolve().parent.parent
GB = 1 << 30
SECONDS = 10  # for a case
NUMBERS = (0, 1, 2, 3, 7, 255, 256, 65535, 65536, 1_000_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)

# --- damage ------------------------------------------------------------------------------------------------------


def damaged(data, rng):
    """Bytes with a few things done to them, half of those in the first hundred bytes, where the headers are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        reach = min(len(data), rng.choice((100, len(data))))
        at = rng.randrange(reach)
        what = rng.choice(("flip", "byte", "number", "cut", "drop", "repeat", "zeros"))
        if what == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif what == "byte":
            data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif what == "number":
            number = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS))[: rng.choice((2, 4))]
            data[at : at + len(number)] = number
        elif what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + rng.choice((1, 4, 100))]
        elif what == "repeat":
            data[at:at] = data[at : at + rng.choice((1, 4, 100))] * rng.choice((1, 10))
        else:
            data[at : at + rng.choice((4, 64))] = bytes(rng.choice((4, 64)))
    return bytes(data)


ODD = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**64, 10**30, -(10**30), 0.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "a", "neutral", "\n", "\x1b[2J", "\ud800", "\udcff", "é" * 300, "../../x", "0", "1e999", "sum", "majority"),
    *([], {}, [[]], [{}], {"": None}, [1, 2, 3], ["a", "a"], {"a": {"a": {"a": 1}}}),
)


def altered(value, rng):
    """A JSON value with something in it replaced, removed, added or exchanged."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        copy, key = dict(value), rng.choice(list(value))
        what = rng.random()
        if what < 0.7:
            copy[key] = altered(value[key], rng)
        elif what < 0.85:
            del copy[key]
        else:
            copy[rng.choice(("", "x", key + " ", *copy))] = rng.choice(ODD)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.85:
        copy, at = list(value), rng.randrange(len(value))
        what = rng.random()
        if what < 0.7:
            copy[at] = altered(value[at], rng)
        elif what < 0.85:
            del copy[at]
        else:
            copy.insert(at, rng.choice((*ODD, copy[at])))
        return copy
    return rng.choice(ODD)


def altered_text(value, rng):
    """Such a value as JSON; now and then damaged as bytes, too deep, or with a number of endless digits."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = altered(value, rng)
    data = json.dumps(value).encode()
    what = rng.random()
    if what < 0.15:
        data = damaged(data, rng)
    elif what < 0.18:
        data = b"[" * 100_000
    elif what < 0.21:
        data = data.replace(b"1", b"1" * 5000, 1)
    return data


# --- the kinds: each makes a thing from a random generator, and uses it as the commands do ----------------------------


class Audio:
    """Files for the audio reader."""

    FORMS = (
        *(("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("wav", "PCM_U8"), ("wav", "IMA_ADPCM")),
        *(("flac", "PCM_16"), ("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III"), ("aiff", "PCM_16"), ("au", "ULAW")),
        *(("caf", "PCM_16"), ("w64", "PCM_16"), ("wav", "DOUBLE")),
    )

    def __init__(self, folder):
        self.folder, self.whole = folder, []
        t = np.arange(5000) / 16000
        wave = 0.3 * np.sin(2 * np.pi * 300 * t * (1 + t)) + 0.01 * np.random.default_rng(0).standard_normal(t.size)
        for form, subtype in self.FORMS:
            for channels, rate in ((1, 16000), (2, 44100)):
                file = io.BytesIO()
                soundfile.write(file, np.stack([wave] * channels, 1), rate, subtype=subtype, format=form)
                self.whole.append((form, file.getvalue()))

    def lie(self, rng):
        """A WAV header of whatever it likes, 4 GB and a million channels among it, before 1 KB."""
        channels, bits = rng.choice((0, 1, 2, 255, 65535)), rng.choice((0, 1, 8, 12, 16, 24, 32, 64, 65535))
        rate, kind = rng.choice(NUMBERS), rng.choice((1, 1, 1, 3, 2, 6, 7, 17, 0x55, 0xFFFE, 0, 65535))
        align, declared = rng.choice((0, 1, 2, 4, 65535, channels * bits // 8 % 65536)), rng.choice((*NUMBERS, 1000))
        head = struct.pack("<HHIIHH", kind, channels, rate, rng.choice(NUMBERS), align, bits)
        chunks = [b"fmt " + struct.pack("<I", rng.choice((16, 16, 16, 18, 40, *NUMBERS))) + head]
        chunks += [b"data" + struct.pack("<I", declared) + rng.randbytes(1000)]
        if rng.random() < 0.2:
            chunks.insert(rng.randrange(3), b"LIST" + struct.pack("<I", rng.choice(NUMBERS)) + rng.randbytes(40))
        return b"RIFF" + struct.pack("<I", rng.choice((*NUMBERS, 1036))) + b"WAVE" + b"".join(chunks)

    def au(self, rng):
        """An AU header has room for millions of channels."""
        fields = [rng.choice((24, *NUMBERS)), rng.choice((1000, *NUMBERS)), rng.choice((1, 2, 3, 6, 7, 27, 99))]
        return (
            b".snd"
            + struct.pack(">5I", *fields, rng.choice((16000, *NUMBERS)), rng.choice(NUMBERS))
            + rng.randbytes(1000)
        )

    def __call__(self, rng):
        from npser.audio import open_recording, read_audio

        form, data = rng.choice(self.whole)
        what = rng.random()
        data = self.lie(rng) if what < 0.2 else self.au(rng) if what < 0.3 else damaged(data, rng)
        suffix = form if rng.random() < 0.9 else rng.choice(("wav", "mp3", "flac", "raw", "opus"))
        path = self.folder / f"case.{suffix}"
        path.write_bytes(data)
        if rng.random() < 0.5:
            blocks = list(open_recording(path).samples())
            samples = np.concatenate(blocks)
        else:
            samples = read_audio(path)
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert samples.size >= 256
        assert np.abs(samples).max() <= 1  # false for NaN


def small_model():
    from npser.features import Standardisation
    from npser.models import build_model

    model = build_model("lstm", backend="reference", hidden=3, seed=1)
    model.scale = Standardisation(np.zeros(128, np.float32), np.ones(128, np.float32))
    model.training = {"segment_hop": 16, "corpus": "x"}
    return model


def odd_array(value, rng):
    """Another array in the place of one."""
    what = rng.randrange(9)
    if what == 0 and value.dtype.kind == "f":
        return value.astype(rng.choice((np.float64, np.float16, np.int64, bool, np.complex64, ">f4")))
    if what == 1:
        return value.reshape(-1)
    if what == 2:
        return value[..., :-1] if value.ndim and value.size else np.zeros(3)
    if what == 3:
        value = value.copy()
        if value.size and value.dtype.kind == "f":
            value.flat[rng.randrange(value.size)] = rng.choice((np.nan, np.inf, 1e38))
        return value
    if what == 4:
        return np.array(rng.choice((0, -1, 2**62, np.nan, "text", b"bytes")))
    if what == 5:
        return np.array([{"a": 1}, None], dtype=object)  # a pickle
    if what == 6:
        return np.zeros((0, *value.shape))
    if what == 7:
        return np.asfortranarray(value)
    return np.zeros(rng.choice(((1,), (1_000_000,), (1, 1, 1, 1))), np.float32)


BOMB = bytes(50 << 20)


def npy(value):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(value))
    return file.getvalue()


def odd_archive(arrays, rng):
    """An npz archive of these arrays with things done to it: members changed, renamed, twice there, packed, lying."""
    members = {f"{name}.npy": npy(value) for name, value in arrays.items()}
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(members))
        what = rng.randrange(6)
        if what == 0:
            members[name] = npy(odd_array(arrays.get(name[:-4], np.zeros(3)), rng))
        elif what == 1:
            members[name] = damaged(members[name], rng)
        elif what == 2:
            del members[name]
        elif what == 3:
            members[rng.choice(("../../../escaped.npy", "/tmp/escaped.npy", "params/x.npy", "about", "a" * 300))] = b"x"
        elif what == 4:  # a header that claims what is not there
            shape = rng.choice(("(99999999999,)", "(-1,)", "(2**99,)", "(3, 'a')", "((1,),)", "(9" * 50))
            kind = rng.choice(("<f4", "|O", "V9", "<U9999999"))
            text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"
            members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        else:
            members[name] = b""
        if not members:
            break
    file = io.BytesIO()
    packing = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", packing) as archive:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name, data in members.items():
            archive.writestr(name, data)
        if rng.random() < 0.1:
            archive.writestr(rng.choice(list(members) or ["x"]), b"again")
        if rng.random() < 0.05:  # a bomb: 50 MB in 50 KB
            archive.writestr(rng.choice(("identity.npy", "about.npy", "params/x.npy")), BOMB, zipfile.ZIP_DEFLATED)
    data = file.getvalue()
    return damaged(data[-2000:], rng).join((data[:-2000], b"")) if rng.random() < 0.4 else data


class Models:
    """Model files."""

    def __init__(self, folder):
        self.path = folder / "m.npz"
        small_model().save(self.path)
        self.whole = self.path.read_bytes()
        with np.load(self.path) as file:
            self.arrays = dict(file)
        self.about = json.loads(str(self.arrays["about"]))

    def __call__(self, rng):
        from npser.errors import printable
        from npser.models import load_model
        from npser.predict import _trained_hop, describe
        from npser.scoring import standardisation

        what = rng.random()
        if what < 0.3:
            data = damaged(self.whole, rng)
        elif what < 0.6:
            text = altered_text(self.about, rng).decode("utf-8", "replace")
            file = io.BytesIO()
            np.savez(file, **(self.arrays | {"about": np.array(text)}))
            data = file.getvalue()
        else:
            data = odd_archive(self.arrays, rng)
        self.path.write_bytes(data)
        model = load_model(self.path, "reference")
        hop = _trained_hop(model, self.path)
        assert "\n" not in printable(describe(model, self.path, hop, 1))  # as the command prints it
        frames = standardisation(model).apply(np.zeros((model.input_frames, model.settings["bins"]), np.float32))
        p = model.predict_proba(frames[None])
        assert p.shape == (1, len(model.labels))


class Checkpoints:
    """States of unfinished folds: whatever is there, the fold is computed."""

    def __init__(self, folder):
        from npser.foldresult import EpochResult
        from npser.optim import SGD
        from npser.progress import Progress
        from npser.trainer import Checkpoint

        self.model, self.said = small_model(), io.StringIO()
        self.checkpoint = Checkpoint(folder / "r0f0.checkpoint.npz", "lstm", Progress(9, self.said))
        sgd = SGD()
        self.model.train_step(np.ones((2, 128, 128), np.float32), np.array([0, 1]), sgd)
        self.checkpoint.save(self.model, sgd, [EpochResult(1, 1.0, 0.5, 1.0)])
        self.whole = self.checkpoint.path.read_bytes()
        with np.load(self.checkpoint.path) as file:
            self.arrays = dict(file)
        self.params = {name: value.copy() for name, value in self.model.params.items()}

    def __call__(self, rng):
        from npser.optim import SGD
        from npser.trainer import MeanWeights

        bits = rng.random() < 0.4
        self.checkpoint.path.write_bytes(damaged(self.whole, rng) if bits else odd_archive(self.arrays, rng))
        self.model.set_params({name: 0 * value for name, value in self.params.items()})
        done = self.checkpoint.load(self.model, SGD(), MeanWeights(), 9)
        assert all(np.isfinite(value).all() for value in self.model.params.values())
        if not done:
            text = self.said.getvalue()
            assert text.count("\n") == 1, text
            self.said.truncate(0)
            self.said.seek(0)
        for name, value in self.model.params.items():
            if not done:  # untouched: the fold starts at its beginning
                assert not value.any(), name
            elif bits:  # what is used in spite of a damaged bit is what was saved
                np.testing.assert_array_equal(value, self.params[name])


class RunFolders:
    """Fold files and config.json, read by the report and by a run that is resumed."""

    def __init__(self, folder):
        from npser.foldresult import EpochResult, fold_result
        from npser.runfolder import RunFolder

        labels = ["neutral", "anger", "fear"]
        self.config = {"labels": labels, "vote": "sum", "arch": "lstm", "corpus": "x", "cv": "stratified", "folds": 2}
        self.config |= {"repeats": 1, "epochs": 2, "seed": 0, "versions": {"numpy": "2"}, "backend": "cpu"}
        self.folder = RunFolder.open_or_create(folder / "run", self.config)
        for n in range(2):
            self.folder.save_fold(
                fold_result(
                    repeat=0, fold=n, labels=labels, vote="sum", epochs=[EpochResult(1, 1.5, 0.5, 2.5)],
                    files=[f"{n}a.wav", f"{n}b.wav"], speakers=["03", "08"], truth=[0, 1], majority=[0, 2],
                    probabilities=[(0.7, 0.2, 0.1), (0.1, 0.5, 0.4)], run={"backend": "cpu", "seconds": 1.0},
                )
            )  # fmt: skip
        self.texts = {p: p.read_bytes() for p in (folder / "run").rglob("*.json")}
        self.values = {p: json.loads(text) for p, text in self.texts.items()}

    def __call__(self, rng):
        from npser.comparison import compare
        from npser.report import merged
        from npser.runfolder import MAY_CHANGE, RunFolder
        from npser.runreport import report

        for path, text in self.texts.items():
            path.write_bytes(text)
        path = rng.choice(list(self.texts))
        path.write_bytes(altered_text(self.values[path], rng))
        if rng.random() < 0.3:
            RunFolder.open_or_create(self.folder.path, self.config, MAY_CHANGE).write_tables()
        folder = RunFolder.open(self.folder.path)
        ((first, results),) = merged([folder])
        document = report(first.config, results)
        for text in (document.text(), document.markdown(), document.html()):
            assert "\x1b" not in text
            text.encode("utf-8", "surrogateescape")
        if results and rng.random() < 0.3:
            other = RunFolder(Path("other"), self.config)
            compare([(folder.path, folder.config, results), (other.path, other.config, results)]).text()


class Packed(RunFolders):
    """The same in one file, damaged before or after it was compressed."""

    def __init__(self, folder):
        from npser.packed import pack

        super().__init__(folder)
        self.path = folder / "run.json.xz"
        pack(self.config, self.folder.load_folds(), self.path)
        self.whole = self.path.read_bytes()
        self.value = json.loads(lzma.decompress(self.whole))

    def __call__(self, rng):
        from npser.packed import open_run
        from npser.runreport import report

        if rng.random() < 0.3:
            self.path.write_bytes(damaged(self.whole, rng))
        elif rng.random() < 0.05:  # claims to be large, and is not
            self.path.write_bytes(lzma.compress(rng.choice((b" ", b"[", b"[0,")) * (1 << 26), preset=0))
        else:
            self.path.write_bytes(lzma.compress(altered_text(self.value, rng), preset=0))
        run = open_run(self.path)
        report(run.config, run.load_folds()).text().encode("utf-8", "surrogateescape")


class Lists:
    """CSV lists of recordings, and EMO-DB's list of listeners."""

    CELLS = (
        "a.wav",
        "b.wav",
        "sub/c.wav",
        "../x.wav",
        "/etc/passwd",
        "03",
        "",
        " ",
        "happy",
        "sadness",
        "train",
        "test",
    )
    CELLS += ("\0", "\n", '"', "\x1b[2J", "\ufeff", "é", "a" * 300, "a.wav;b.wav", "1e9", "/", ".", "\ud800")

    def __init__(self, folder):
        self.folder = folder
        for name in ("a.wav", "b.wav"):
            (folder / name).write_bytes(b"RIFF")

    def __call__(self, rng):
        from npser.analysis import listeners
        from npser.corpus import open_corpus

        if rng.random() < 0.15:
            text = "nr\tfile\trecognised\n1\t03a01Fa.wav\t90,00\t100,00\n2\t03a01Nc.wav\t100,00\t95,0\n"
            (self.folder / "erkennung.txt").write_bytes(damaged(text.encode("latin-1"), rng))
            listeners(self.folder / "erkennung.txt")
            return
        delimiter = rng.choice(",,;\t")
        head = rng.sample(["path", "speaker", "emotion", "text", "split", "x"], rng.randint(1, 6))
        head = ["path", "emotion", "speaker"] if rng.random() < 0.7 else head
        rows = [["a.wav", "happy", "03"], ["b.wav", "sadness", "08"]]
        for _ in range(rng.choice((0, 1, 2, 5))):
            rows.insert(rng.randrange(3), [rng.choice(self.CELLS) for _ in range(rng.choice((3, 3, 1, 9)))])
        data = "\n".join(delimiter.join(row) for row in (head, *rows)).encode("utf-8", "surrogatepass")
        if rng.random() < 0.4:
            data = damaged(data, rng)
        (self.folder / "list.csv").write_bytes(data)
        corpus = open_corpus(str(self.folder / "list.csv"))
        assert len(corpus.labels) > 1
        from npser.inventory import describe

        assert not any("\x1b" in line for line in describe(corpus, None))


class Names:
    """Folders with names of every kind, links and loops."""

    PARTS = (
        "a",
        "-rf",
        "--help",
        "é",
        "e\u0301",
        "日本語",
        "a\nb",
        "\t",
        " ",
        "a b",
        "\x1b[31m",
        "\x7f",
        "..x",
        "'",
        '"',
        "\\",
    )
    PARTS += ("$(x)", "*", "?", "n" * 200, "\udce9\udcff", "\u202e", "CON", "a;b", "a,b", "%s", "{}", "|", "\u2028")

    def __init__(self, folder):
        self.folder, self.number = folder, 0
        t = np.arange(4000) / 16000
        soundfile.write(folder / "tone.wav", 0.3 * np.sin(2 * np.pi * 300 * t), 16000)
        self.tone = (folder / "tone.wav").read_bytes()

    def name(self, rng):
        text = "".join(rng.choice(self.PARTS) for _ in range(rng.choice((1, 1, 2))))
        data = text.encode("utf-8", "surrogateescape")[: rng.choice((20, 251))]
        return os.fsdecode(data)

    def __call__(self, rng):
        from npser.corpus import open_corpus
        from npser.foldresult import fold_result
        from npser.frontend import read_frames
        from npser.inventory import describe
        from npser.predict import find_inputs
        from npser.runfolder import RunFolder

        self.number += 1
        root = self.folder / f"tree{self.number}"
        emotions = [root / self.name(rng) for _ in range(2)]
        for folder in emotions:
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                (folder / (self.name(rng) + rng.choice((".wav", ".WAV")))).write_bytes(self.tone)
        if rng.random() < 0.3:
            (emotions[0] / "loop").symlink_to(root, target_is_directory=True)
        if rng.random() < 0.2:
            (emotions[0] / "dangling.wav").symlink_to(root / "nowhere")
        if rng.random() < 0.2:
            (emotions[0] / "itself.wav").symlink_to(emotions[0] / "itself.wav")
        if rng.random() < 0.1:
            os.mkfifo(emotions[0] / "pipe.wav")
        if rng.random() < 0.1:
            (emotions[0] / "folder.wav").mkdir()
        inputs = list(find_inputs([str(root), str(emotions[0] / "nothing")], root / "spool"))
        assert inputs
        corpus = open_corpus(str(root))
        parts = describe(corpus, None)
        assert not any("\x1b" in part for part in parts)
        assert not any("\n" in part for n, part in enumerate(parts) if n != 2)  # 2 is the table
        read_frames(corpus, "reference")
        files = [u.name for u in corpus.utterances]
        config = {"labels": list(corpus.labels), "vote": "sum", "corpus": corpus.name}
        run = RunFolder.open_or_create(root / "run", config)
        p = np.eye(len(corpus.labels))[corpus.targets][:, ::-1]
        run.save_fold(
            fold_result(
                repeat=0, fold=0, labels=corpus.labels, vote="sum", epochs=[], files=files, speakers=[""] * len(files),
                truth=corpus.targets, probabilities=p, majority=p.argmax(axis=1), run={},
            )
        )  # fmt: skip
        assert [u.file for u in run.load_fold(0, 0).utterances] == files
        assert "\x1b" not in (root / "run" / "report.md").read_text(encoding="utf-8", errors="surrogateescape")


class Caches:
    """Kept frames: damaged ones are made again."""

    def __init__(self, folder):
        from npser.corpus import open_corpus

        for name in ("happy", "sadness"):
            (folder / "c" / name).mkdir(parents=True)
            t = np.arange(4000) / 16000
            soundfile.write(folder / "c" / name / "a.wav", 0.3 * np.sin(2 * np.pi * 300 * t), 16000)
        self.corpus = open_corpus(str(folder / "c"))
        self.frames = self.read()
        from npser.corpus import user_cache

        (self.path,) = user_cache().glob("frames-*.npz")
        self.whole = self.path.read_bytes()
        with np.load(self.path) as file:
            self.arrays = dict(file)

    def read(self):
        from npser.frontend import read_frames

        return read_frames(self.corpus, "reference")

    def __call__(self, rng):
        bits = rng.random() < 0.5
        self.path.write_bytes(damaged(self.whole, rng) if bits else odd_archive(self.arrays, rng))
        for ours, whole in zip(self.read(), self.frames, strict=True):
            assert ours.shape[1] == whole.shape[1]
            if bits:
                np.testing.assert_array_equal(ours, whole)


class Options:
    """Command lines that ask for nothing that would be computed."""

    WORDS = (
        "--arch",
        "lstm",
        "--data",
        "demo",
        "--cv",
        "none",
        "--folds",
        "2",
        "--only",
        "0.0",
        "--seed",
        "--out",
        "-1",
    )
    WORDS += ("1e9", "9" * 30, "9" * 5000, "", "\n", "\udcff", "--", "-", "--epochs", "0", "é", "--threads", "99999")
    WORDS += (
        "--backend",
        "cuda",
        "--vote",
        "--workers",
        "--save",
        "/",
        "--help",
        "--precision",
        "tf32",
        "0.99999999999",
    )

    def __init__(self, folder):
        (folder / "nothing").mkdir()
        self.folder = folder

    def __call__(self, rng):
        from npser import predict, report, train

        words = [rng.choice(self.WORDS) for _ in range(rng.randint(0, 8))]
        command = rng.choice((train, predict, report))
        words += ["--data", str(self.folder / "nothing")] if command is train else []
        error, output = io.StringIO(), io.StringIO()
        before, sys.stderr, sys.stdout = (sys.stderr, sys.stdout), error, output
        try:
            command.main(words)
        except SystemExit as end:
            if end.code:
                assert end.code == 2, end.code  # noqa: PT017
                (line,) = error.getvalue().split("\n")[:-1]
                assert line.startswith("npser.")
        finally:
            sys.stderr, sys.stdout = before


KINDS = {
    kind.__name__: kind for kind in (Audio, Models, Checkpoints, RunFolders, Packed, Lists, Names, Caches, Options)
}
SHARES = {
    "Audio": 35,
    "Models": 18,
    "Checkpoints": 8,
    "RunFolders": 10,
    "Packed": 5,
    "Lists": 12,
    "Names": 3,
    "Caches": 3,
    "Options": 6,
}

# --- running them ------------------------------------------------------------------------------------------------


class Hang(BaseException):
    pass


def watch_writing(allowed):
    """From now on a list of the files outside the folder `allowed` that something wanted to write."""
    outside = []

    def hook(event, args):
        if event == "open":
            path, mode, flags = args
            writing = (mode and set(mode) & set("wxa+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [path] if writing else []
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = args[:2]
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            paths = args[:1]
        else:
            return
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                name = os.path.abspath(os.fsdecode(path))
                if not name.startswith((str(allowed), "/dev/", "/proc/")):
                    outside.append(f"{event} {name}")

    sys.addaudithook(hook)
    return outside


def run_cases(kind, first, count, folder):
    """Run cases by number; prints a summary as JSON, and what went wrong on standard error."""
    from npser.errors import RunFailed, UserError

    os.environ["XDG_CACHE_HOME"] = str(folder)
    case = KINDS[kind](folder)
    for number in range(3):  # imports and compiles what the first case would
        with contextlib.suppress(Exception):
            case(random.Random(f"{kind} {number}"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * GB,) * 2)

    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    warnings.simplefilter("error")  # a warning would be a second line
    outside = watch_writing(folder)
    used = refused = wrong = 0
    slowest = 0.0
    for number in range(first, first + count):
        started = time.thread_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(300)  # for one that waits: others use the machine, too, so that the clock says little
        fault = None
        try:
            case(random.Random(f"{kind} {number}"))
            used += 1
        except (UserError, RunFailed) as error:
            refused += 1
            message = str(error)
            if not message or not message.isprintable():
                fault = f"its message is {message!r}"
        except Exception:
            fault = traceback.format_exc()
        except Hang:
            fault = "it hangs\n" + traceback.format_exc()
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.thread_time() - started
        slowest = max(slowest, seconds)
        if outside:
            fault = f"wrote outside: {outside}"
            outside.clear()
        if fault:
            wrong += 1
            print(f"--- {kind} {number}: {fault}", file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if peak > 2048:
        wrong += 1
        print(f"--- {kind}: {peak:.0f} MB", file=sys.stderr)
    summary = {"cases": count, "used": used, "refused": refused, "wrong": wrong}
    print(json.dumps(summary | {"slowest": round(slowest, 2), "megabytes": round(peak)}))
    return wrong


def fuzz(kind, first, count, folder):
    """`run_cases` in a process of its own; its summary."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    command = [sys.executable, __file__, kind, str(first), str(count), str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=7200, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:] + done.stdout[-500:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_some_cases(kind, tmp_path):
    summary = fuzz(kind, 0, 4 * SHARES[kind], tmp_path)
    assert summary["used"] + summary["refused"] == 4 * SHARES[kind]
    assert summary["refused"] or kind in ("Checkpoints", "Caches", "Names", "Options")
    assert summary["used"] or kind == "Options"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_cases(kind, tmp_path, capsys):
    cases = int(os.environ.get("NPSER_FUZZ", "10000")) * SHARES[kind] // 100
    summary = fuzz(kind, 1_000_000, cases, tmp_path)
    with capsys.disabled():
        print(f"\n{kind}: {summary}")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        kind, first, count, *folder = sys.argv[1:]
        sys.exit(bool(run_cases(kind, int(first), int(count), Path(folder[0] if folder else temporary).resolve())))
