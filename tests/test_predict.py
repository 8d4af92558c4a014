"""The command `python -m npser.predict`: what it prints, what it refuses, and that long recordings take no memory."""

import csv
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run_module

from npser import predict, verdicts
from npser.audio import read_audio
from npser.errors import UserError
from npser.features import Standardisation, WindowSet, log_magnitude
from npser.models import build_model
from npser.trainer import evaluate

LABELS = ("sadness", "happy", "Überraschung")


@pytest.fixture(scope="module")
def model():
    model = build_model("lstm", hidden=8, classes=3, seed=4)
    model.set_params({"out.w": 8 * model.params["out.w"]})  # far from one third each
    model.scale = Standardisation(np.full(128, -5, np.float32), np.full(128, 2, np.float32))
    model.labels, model.training = LABELS, {"segment_hop": 20, "corpus": "tones"}
    return model


@pytest.fixture(scope="module")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.npz"
    model.save(path)
    return path


def sweep(seconds=2.0, rate=16000, seed=0):
    t = np.arange(int(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) + 0.02 * np.random.default_rng(seed).standard_normal(len(t))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings in every common format, in folders, and one file that is none."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "deep" / "er").mkdir(parents=True)
    soundfile.write(root / "a.wav", sweep(), 16000)
    soundfile.write(root / "b.flac", sweep(rate=44100), 44100)
    soundfile.write(root / "deep" / "c.ogg", np.stack([sweep(rate=48000)] * 2, axis=1), 48000)
    soundfile.write(root / "deep" / "er" / "d.mp3", sweep(rate=22050), 22050)
    soundfile.write(root / "deep" / "short.wav", sweep(0.2), 16000)
    (root / "notes.txt").write_text("not audio")
    return root


def expected(model, path):
    """The probabilities by the protocol's own way: frames of the whole file, windows, sum."""
    frames = log_magnitude(model.k, read_audio(path))
    return evaluate(model, WindowSet([frames], model.scale, model.input_frames, 20)).probabilities[0]


def test_json_lines_agree_with_the_evaluation_in_every_format(model, model_file, folder):
    result = run_module("npser.predict", model_file, folder, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["a.wav", "b.flac", "deep/c.ogg", "deep/er/d.mp3", "deep/short.wav"]
    assert [line["file"] for line in lines] == [str(folder / name) for name in names]
    for line in lines:
        assert set(line) == {"file", "label", "probabilities"}
        p = expected(model, line["file"])
        np.testing.assert_allclose(list(line["probabilities"].values()), p, atol=2e-6)
        assert tuple(line["probabilities"]) == LABELS
        assert line["label"] == LABELS[p.argmax()]


def test_csv_and_table_hold_the_same(model, model_file, folder):
    as_csv = run_module("npser.predict", model_file, folder / "a.wav", folder / "deep", "--csv")
    rows = list(csv.DictReader(io.StringIO(as_csv.stdout)))
    assert list(rows[0]) == ["file", "label", "p_sadness", "p_happy", "p_Überraschung"]
    assert len(rows) == 4
    table = run_module("npser.predict", model_file, folder / "a.wav", folder / "deep")
    lines = table.stdout.splitlines()
    assert len(lines) == 4
    for row, line in zip(rows, lines, strict=True):
        best = max(float(row[f"p_{label}"]) for label in LABELS)
        assert line.split()[:3] == [row["file"], row["label"], f"{100 * best:.0f}"]
        assert line.count("█") == round(20 * best)
        assert line.count("█") + line.count("░") == 20


def test_a_terminal_without_such_characters_gets_others(model_file, folder):
    result = run_module("npser.predict", model_file, folder / "a.wav", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert "#" in result.stdout
    assert "█" not in result.stdout


def test_standard_input(model, model_file, folder):
    for name in ("a.wav", "deep/c.ogg", "deep/er/d.mp3"):
        command = [sys.executable, "-m", "npser.predict", str(model_file), "-", "--json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        data = (folder / name).read_bytes()
        result = subprocess.run(command, input=data, capture_output=True, env=environment, check=True)
        line = json.loads(result.stdout)
        assert line["file"] == "-"
        np.testing.assert_allclose(list(line["probabilities"].values()), expected(model, folder / name), atol=2e-6)


def test_timeline_has_a_line_for_every_window(model, model_file, folder):
    path = folder / "a.wav"  # 32000 samples: 249 frames, windows of 128 frames 20 apart
    result = run_module("npser.predict", model_file, path, "--timeline", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 7
    assert [line["start"] for line in lines] == [round(n * 20 * 128 / 16000, 3) for n in range(7)]
    assert lines[0]["end"] == pytest.approx((127 * 128 + 256) / 16000, abs=1e-3)
    mean = np.mean([list(line["probabilities"].values()) for line in lines], axis=0)
    np.testing.assert_allclose(mean, expected(model, path), atol=2e-6)
    table = run_module("npser.predict", model_file, path, "--timeline", "--segment-hop", "60").stdout.splitlines()
    assert table[0] == str(path)
    assert table[1].startswith("  0:00:00.0 - 0:00:01.0  ")
    assert len(table) == 5
    assert table[-1].startswith("  all of it, 0:00:02.0")
    header, *rows = run_module("npser.predict", model_file, path, "--timeline", "--csv").stdout.splitlines()
    assert header.startswith("file,start,end,label,p_sadness")
    assert len(rows) == 7


def test_several_models_decide_together(model, model_file, folder, tmp_path, capsys):
    others = []
    for seed in (5, 6):
        other = build_model("lstm", hidden=8, classes=3, seed=seed)
        other.set_params({"out.w": 8 * other.params["out.w"]})
        other.scale = Standardisation(np.full(128, -3, np.float32), np.full(128, seed, np.float32))  # its own
        other.labels, other.training = LABELS, {"segment_hop": 40}
        other.save(tmp_path / f"{seed}.npz")
        others.append(other)
    arguments = [str(model_file), "--with", str(tmp_path / "5.npz"), "--with", str(tmp_path / "6.npz")]
    sounds = [str(folder / "a.wav"), str(folder / "deep" / "short.wav")]
    assert predict.main([*arguments, *sounds, "--json", "--verbose"]) == 0
    printed = capsys.readouterr()
    for line, path in zip(map(json.loads, printed.out.splitlines()), sounds, strict=True):
        mean = np.mean([expected(m, path) for m in (model, *others)], axis=0)
        np.testing.assert_allclose([*line["probabilities"].values()], mean, atol=2e-6)
    assert all(f"{name}: lstm trained on" in printed.err for name in ("m.npz", "5.npz", "6.npz"))
    with pytest.raises(UserError, match=r"--with .*m\.npz: this model is there already"):
        predict.main([str(model_file), "--with", str(model_file), *sounds])


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        (
            "lstm",
            {"labels": ("calm", "joy", "rage")},
            r"--with .*o\.npz: lstm for calm, joy, rage in windows of 128 frames, but .*m\.npz is lstm",
        ),
        ("cnn", {}, r"--with .*o\.npz: cnn for sadness, .*, but .*m\.npz is lstm"),
        ("lstm", {"bins": 64}, r"^[^ ]*o\.npz: the model reads spectra of 64 bins"),
        ("lstm", {"scale": None}, r"^[^ ]*o\.npz: the model holds no feature statistics"),
    ],
)
def test_only_models_of_one_kind_decide_together(model_file, folder, tmp_path, arch, changes, said):
    bins = changes.get("bins", 128)
    other = build_model(arch, hidden=8, filters=2, classes=3, bins=bins)
    other.labels, other.training = changes.get("labels", LABELS), {"segment_hop": 20}
    other.scale = changes.get("scale", Standardisation(np.zeros(bins, np.float32), np.ones(bins, np.float32)))
    other.save(tmp_path / "o.npz")
    with pytest.raises(UserError, match=said):
        predict.main([str(model_file), "--with", str(tmp_path / "o.npz"), str(folder / "a.wav")])


def test_bad_files_are_named_and_the_others_labelled(model_file, folder, tmp_path):
    (tmp_path / "garbage.wav").write_bytes(b"garbage" * 100)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    (tmp_path / "none").mkdir()
    result = run_module(
        "npser.predict",
        model_file,
        *(tmp_path / "garbage.wav", tmp_path / "absent.wav", folder / "a.wav", tmp_path / "silent.wav"),
        *(folder / "notes.txt", tmp_path / "none", folder / "b.flac"),
    )
    assert result.returncode == 2
    assert [line.split()[0] for line in result.stdout.splitlines()] == [str(folder / "a.wav"), str(folder / "b.flac")]
    complaints = result.stderr.splitlines()
    names = ["garbage.wav", "absent.wav", "silent.wav", "notes.txt", "none"]
    assert len(complaints) == 5
    for name, complaint in zip(names, complaints, strict=True):
        assert complaint.startswith("npser.predict: ")
        assert name in complaint


def test_verbose_says_how_fast_it_was(model_file, folder):
    result = run_module("npser.predict", model_file, folder / "a.wav", folder / "b.flac", "--verbose")
    assert "lstm trained on tones, no cross-validation score" in result.stderr
    assert "2 recordings, 4.0 s of audio, 14 windows in" in result.stderr
    assert "times real time" in result.stderr


def test_one_recording_is_one(model_file, folder):
    result = run_module("npser.predict", model_file, folder / "deep" / "short.wav", "--verbose", "--threads", "1")
    assert "backend cpu, 1 thread\n" in result.stderr
    assert "1 recording, 0.2 s of audio, 1 window in" in result.stderr


@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        ("<&-", 2, "npser.predict: -: there is no standard input: it is closed\n"),
        ("< a.wav > /dev/full", 1, "npser.predict: standard output cannot be written (No space left on device)\n"),
        ("< a.wav >&-", 0, ""),
        ("< notes.txt 2>&-", 2, ""),
    ],
)
def test_standard_streams_that_are_closed_or_full(model_file, folder, streams, status, said):
    command = ["sh", "-c", f"{sys.executable} -m npser.predict {model_file} - {streams}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert (result.returncode, result.stderr) == (status, said)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_how_far_a_long_recording_is(model, folder, monkeypatch):
    """By a clock that goes on by two seconds whenever somebody looks."""
    times = itertools.count(0, 2)
    monkeypatch.setattr(verdicts.time, "monotonic", lambda: float(next(times)))
    monkeypatch.setattr(sys, "stderr", Terminal())
    out, path = io.StringIO(), str(folder / "b.flac")
    predict.label_all([model], [predict.Input("b.flac", path)], 20, verdicts.JSONLines(LABELS, False, out), False)
    drawn = sys.stderr.getvalue().split("\r\x1b[K")
    assert drawn[1] == "b.flac  reading, 0:00:02.0"
    assert re.fullmatch(r"b\.flac  0:00:01\.0 of 0:00:02\.0  \d times real time", drawn[2])
    assert len(drawn) == 10  # what it began with, the reading, seven windows
    assert drawn[-1] == ""  # nothing of it stays
    assert json.loads(out.getvalue())["file"] == "b.flac"


def test_help_breaks_neither_examples_nor_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "  python -m npser.predict model.npz recordings/ --csv > labels.csv" in lines
    assert not [line for line in lines if line.endswith("-")]
    assert max(map(len, lines)) <= 80


def test_wrong_use_is_one_line(model_file, folder, tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not a model")
    bare = build_model("lstm", hidden=2, backend="reference")
    bare.save(tmp_path / "bare.npz")
    bare.scale = Standardisation(np.zeros(128, np.float32), np.ones(128, np.float32))
    bare.save(tmp_path / "no-hop.npz")
    for arguments, said in [
        ((tmp_path / "bad.npz", folder), "bad.npz: not a model file"),
        ((tmp_path / "absent.npz", folder), "there is no such file"),
        ((folder / "a.wav", folder), "a.wav: not a model file"),
        ((tmp_path / "bare.npz", folder), "bare.npz: the model holds no feature statistics"),
        ((tmp_path / "no-hop.npz", folder), "add --segment-hop"),
        ((model_file, "-", "-"), "only once"),
        ((model_file, folder, "--json", "--csv"), "not allowed with"),
        ((model_file,), "FILE_OR_FOLDER"),
    ]:
        with pytest.raises((UserError, SystemExit)) as caught:
            predict.main([str(argument) for argument in arguments])
        message = str(caught.value) if caught.type is UserError else capsys.readouterr().err
        assert message.rstrip("\n").count("\n") == 0
        assert said in message


def test_memory_does_not_grow_with_the_recording(model_file, tmp_path):
    """20 minutes are 150 MB as float64 and 77 MB as frames; none of that may be held."""

    def peak(minutes):
        with soundfile.SoundFile(tmp_path / "long.wav", "w", 16000, 1) as file:
            for n in range(minutes):
                file.write(sweep(60.0, seed=n))
        code = (
            "import resource, sys; from npser.predict import main; main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, model_file, tmp_path / "long.wav", "--segment-hop", "500"]
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        return int(result.stdout.splitlines()[-1]) * 1024  # Linux counts in KiB

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # counted on this system
    assert peak(20) - peak(3) < 30e6


def test_json_where_the_terminal_is_not_utf8(model_file, folder, tmp_path):
    path = tmp_path / "grüße_😀.wav"
    path.write_bytes(next(folder.rglob("*.wav")).read_bytes())
    result = run_module("npser.predict", model_file, path, "--json", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["file"] == str(path)


def test_a_model_whose_probabilities_overflow_is_one_line(model, folder, tmp_path):
    huge = build_model("lstm", hidden=8, classes=3, seed=4)
    huge.labels, huge.training = model.labels, model.training
    huge.scale = Standardisation(model.scale.mean, np.full(128, 1e-44, np.float32))
    huge.save(tmp_path / "huge.npz")
    result = run_module("npser.predict", tmp_path / "huge.npz", next(folder.rglob("*.wav")))
    assert result.returncode == 2
    assert "not finite" in result.stderr
    assert result.stdout == ""
