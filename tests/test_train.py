"""The command `python -m npser.train`: what it writes, how it resumes, what it refuses."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import has_gpu, run_module, start_module, write_tone

from npser import train, trainer
from npser.errors import RunFailed, UserError
from npser.features import FRAME, HOP
from npser.foldresult import fold_result
from npser.modelfile import score_of
from npser.models import load_model
from npser.optim import SGD
from npser.packed import pack
from npser.runfolder import RunFolder

# The lstm is the fastest of the three networks; a hop of 40 frames leaves one window of a tone.
WHOLE = ("--arch", "lstm", "--epochs", "3", "--segment-hop", "40")
SHORT = (*WHOLE, "--folds", "2", "--repeats", "1")


def numbers(fold_file: Path) -> dict:
    """A fold's result without what depends on the clock."""
    fold = json.loads(fold_file.read_text())
    for epoch in fold["epochs"]:
        del epoch["seconds"]
    del fold["run"]
    return fold


@pytest.fixture(scope="module")
def finished(tones, tmp_path_factory) -> Path:
    """The run folder of a short cross-validation."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = run_module("npser.train", *SHORT, "--data", tones, "--out", out)
    assert result.returncode == 0, result.stderr
    (out / "stdout").write_text(result.stdout)
    (out / "stderr").write_text(result.stderr)
    return out


def test_run_folder_holds_config_folds_predictions_and_report(finished, tones):
    config = json.loads((finished / "config.json").read_text())
    assert config["arch"] == "lstm"
    assert config["labels"] == ["sadness", "happy"]
    assert config["features"]["frame"] == FRAME
    assert config["features"]["hop"] == HOP
    assert config["versions"]["numba"]
    folds = [json.loads((finished / "folds" / f"r0f{f}.json").read_text()) for f in (0, 1)]
    tested = [u["file"] for fold in folds for u in fold["utterances"]]
    everything = [path.relative_to(tones).as_posix() for path in tones.rglob("*.wav")]
    assert sorted(tested) == sorted(everything)
    assert [e["epoch"] for e in folds[0]["epochs"]] == [1, 2, 3]
    with (finished / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    head = ["repeat", "fold", "file", "speaker", "truth", "prediction"]
    assert list(rows[0]) == [*head, "p_sadness", "p_happy"]
    assert len(rows) == len(everything)
    assert all(abs(float(row["p_sadness"]) + float(row["p_happy"]) - 1) < 1e-5 for row in rows)
    assert (finished / "report.md").read_text().startswith("# lstm on tones")
    assert not list(finished.rglob("*checkpoint*"))


def test_output_says_what_is_run_and_how_it_went(finished):
    out, log = (finished / "stdout").read_text(), (finished / "stderr").read_text()
    first, second, third = out.splitlines()[:3]
    assert re.match(r"lstm on corpus tones\d*: 14 utterances, 2 emotions, 0.3 min of speech", first)
    assert second.startswith("0.395 million parameters, backend cpu")
    assert "2 stratified folds x 1 repeat, 3 epochs of windows 40 frames apart, batches of 32" in third
    for wanted in ("precision", "recall", "F1", "UAR", "Confusion matrix", "+-"):
        assert wanted in out
    # A pipe gets plain lines: one per epoch and fold, no control characters.
    assert "\r" not in log
    assert "\x1b" not in log
    epochs = re.findall(
        r"fold 0\.[01]  epoch [123]/3  loss \d+\.\d+  training accuracy .* %  +\d+ windows/s",
        log,
    )
    assert len(epochs) == 6
    assert re.search(r"about .* for all of it \(\d+ ms an update", log)
    assert "checkpoint written in" in log


def test_same_command_again_trains_nothing_and_prints_the_same_table(finished, tones):
    before = {path: path.read_bytes() for path in (finished / "folds").iterdir()}
    again = run_module("npser.train", *SHORT, "--data", tones, "--out", finished)
    assert again.returncode == 0, again.stderr
    assert "epoch" not in again.stderr
    assert "2 of 2 folds are finished already" in again.stdout
    assert again.stdout.split("\n\n", 1)[1] == (finished / "stdout").read_text().split("\n\n", 1)[1]
    assert {path: path.read_bytes() for path in (finished / "folds").iterdir()} == before


def test_majority_vote_may_be_asked_for_later(finished, tones, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    again = run_module("npser.train", *SHORT, "--data", tones, "--out", out, "--vote", "majority")
    assert again.returncode == 0, again.stderr
    assert "majority vote" in (out / "report.md").read_text().split("\n## ")[0]


@pytest.mark.parametrize(("option", "value", "old"), [("--epochs", "4", "3"), ("--seed", "5", "0")])
def test_other_options_in_the_same_folder_are_refused(finished, tones, option, value, old):
    result = run_module("npser.train", *SHORT, option, value, "--data", tones, "--out", finished)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{option} was {old}, now {value}" in result.stderr


def kill_at_checkpoints(command, *checkpoints):
    """SIGKILL as soon as all of these are there; their epochs then claim to be another machine's, of 1000 seconds."""
    process = start_module("npser.train", *command)
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in checkpoints) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # workers end with it
    for path in checkpoints:
        if path.with_name(path.name.replace(".checkpoint.npz", ".json")).exists():
            pytest.fail("the run was over before it could be killed: make it longer")
        with np.load(path) as file:
            state = dict(file)
        state["epochs"][:, 3] = 1000
        state["origins"] = np.array(["another commit on another machine"])
        np.savez(path, **state)


def test_killed_run_resumes_with_the_same_result(finished, tones, tmp_path):
    """SIGKILL after the first checkpoint; the resumed fold equals the one that was never stopped."""
    command = (*SHORT, "--data", tones, "--out", tmp_path / "out", "--only", "0.0")
    checkpoint = tmp_path / "out" / "folds" / "r0f0.checkpoint.npz"
    kill_at_checkpoints(command, checkpoint)
    result = run_module("npser.train", *command)
    assert result.returncode == 0, result.stderr
    assert "epoch 1/3" not in result.stderr  # it went on, and did not start again
    assert json.loads((tmp_path / "out" / "folds" / "r0f0.json").read_text())["run"]["seconds"] > 1000
    assert numbers(tmp_path / "out" / "folds" / "r0f0.json") == numbers(finished / "folds" / "r0f0.json")
    assert not list(tmp_path.rglob("*checkpoint*"))


@pytest.mark.parametrize("arch", ["cnn", "lstm"])
def test_the_best_recipe_goes_on_where_it_was_stopped_and_is_computed_anywhere(arch, tones, tmp_path, monkeypatch):
    """Augmented, its rate falling or its weights averaged, with dropout in the cnn: the same bits."""
    command = ["--arch", arch, "--recipe", "best", "--data", str(tones), "--folds", "2", "--repeats", "1"]
    command += ["--epochs", "4", "--segment-hop", "64", "--threads", "1", "--out"]
    assert train.main([*command, str(tmp_path / "whole")]) == 0

    save = trainer.Checkpoint.save

    def stop(checkpoint, model, sgd, done, mean=None):
        taken = save(checkpoint, model, sgd, done, mean)
        if len(done) in (1, 3):
            raise KeyboardInterrupt
        return taken

    for _ in range(2):
        monkeypatch.setattr(trainer.Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main([*command, str(tmp_path / "stopped"), "--only", "0.0"])
    monkeypatch.setattr(trainer.Checkpoint, "save", save)
    assert train.main([*command, str(tmp_path / "stopped"), "--only", "0.0"]) == 0
    elsewhere = run_module("npser.train", *command, tmp_path / "elsewhere", "--only", "0.1", "--no-checkpoint")
    assert elsewhere.returncode == 0, elsewhere.stderr
    for run, fold in (("stopped", "r0f0.json"), ("elsewhere", "r0f1.json")):
        assert numbers(tmp_path / run / "folds" / fold) == numbers(tmp_path / "whole" / "folds" / fold)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_folds_of_workers_go_on_from_their_checkpoints(tones, tmp_path):
    command = ["--arch", "lstm", "--folds", "2", "--repeats", "1", "--epochs", "200", "--segment-hop", "40"]
    command += ["--threads", "2", "--workers", "2", "--data", tones, "--out", tmp_path / "out"]
    checkpoints = [tmp_path / "out" / "folds" / f"r0f{fold}.checkpoint.npz" for fold in (0, 1)]
    kill_at_checkpoints(command, *checkpoints)
    result = run_module("npser.train", *command)
    assert result.returncode == 0, result.stderr
    for fold in (0, 1):
        told = json.loads((tmp_path / "out" / "folds" / f"r0f{fold}.json").read_text())["run"]
        assert told["seconds"] > 1000
        assert told["also_by"] == ["another commit on another machine"]


def test_damaged_checkpoint_is_named_and_the_fold_starts_again(finished, tones, tmp_path):
    (tmp_path / "folds").mkdir()
    (tmp_path / "folds" / "r0f0.checkpoint.npz").write_bytes(b"PK\x03\x04 not much of an archive")
    command = ("npser.train", *SHORT, "--data", tones, "--out", tmp_path, "--only", "0.0", "--no-checkpoint")
    assert run_module(*command).returncode == 0  # without checkpoints it is not even looked at
    (tmp_path / "folds" / "r0f0.json").unlink()
    (tmp_path / "folds" / "r0f0.checkpoint.npz").write_bytes(b"PK\x03\x04 not much of an archive")
    result = run_module(*command[:-1])
    assert result.returncode == 0, result.stderr
    assert "r0f0.checkpoint.npz cannot be used" in result.stderr
    assert numbers(tmp_path / "folds" / "r0f0.json") == numbers(finished / "folds" / "r0f0.json")


def test_one_thread_gives_the_same_numbers_as_two(finished, tones, tmp_path):
    result = run_module("npser.train", *SHORT, "--data", tones, "--out", tmp_path, "--only", "0.1", "--threads", "1")
    assert result.returncode == 0, result.stderr
    assert numbers(tmp_path / "folds" / "r0f1.json") == numbers(finished / "folds" / "r0f1.json")


def test_global_random_state_changes_nothing(finished, tones, tmp_path):
    code = (
        "import random, sys, numpy; numpy.random.seed(int(sys.argv.pop(1))); random.seed(3);"
        "from npser.train import main; main(sys.argv[1:])"
    )
    command = (*SHORT, "--data", str(tones), "--out", str(tmp_path), "--only", "0.0")
    environment = {"PYTHONPATH": str(Path(train.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, "77", *command], check=True, env=os.environ | environment, timeout=300)
    assert numbers(tmp_path / "folds" / "r0f0.json") == numbers(finished / "folds" / "r0f0.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch-size", "4"), "the loss is (nan|inf)"),
        (("--batch-size", "999", "--epochs", "1"), "a parameter is not finite after epoch 1"),  # one update, the last
    ],
)
def test_divergence_stops_with_a_message_and_writes_no_result(tones, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(trainer, "SGD", lambda **_: SGD(lr=float("inf")))
    with pytest.raises(RunFailed, match=rf"fold 0\.0: the training diverged: {said}"):
        train.main([*SHORT, *options, "--data", str(tones), "--out", str(tmp_path)])
    assert not list((tmp_path / "folds").glob("r*f*.*"))


def test_fit_everything_and_load_the_model(tones, tmp_path):
    path = tmp_path / "model.npz"
    options = ("--arch", "lstm", "--cv", "none", "--epochs", "2", "--data", tones, "--out", tmp_path / "out")
    result = run_module("npser.train", *options, "--save", path)
    assert result.returncode == 0, result.stderr
    model = load_model(path)
    assert model.labels == ("sadness", "happy")
    assert model.training["epochs"] == 2
    assert model.scale.mean.shape == (128,)
    assert np.allclose(model.predict_proba(np.zeros((3, 128, 128), np.float32)).sum(axis=1), 1)


def test_leave_one_speaker_out_makes_a_fold_of_each_speaker(tmp_path):
    for speaker, text, emotion in ((3, 1, "W"), (3, 2, "T"), (8, 1, "W"), (8, 2, "T"), (9, 1, "W"), (9, 2, "T")):
        write_tone(tmp_path / "corpus" / f"{speaker:02d}a{text:02d}{emotion}a.wav", 200 if emotion == "T" else 700)
    out = tmp_path / "out"
    command = ("--arch", "lstm", "--cv", "speaker", "--epochs", "1", "--repeats", "1", "--data", tmp_path / "corpus")
    result = run_module("npser.train", *command, "--out", out)
    assert result.returncode == 0, result.stderr
    for fold, speaker in enumerate(("03", "08", "09")):
        tested = json.loads((out / "folds" / f"r0f{fold}.json").read_text())["utterances"]
        assert {u["speaker"] for u in tested} == {speaker}


def test_help_answers_without_importing_the_heavy_packages():
    code = (
        "import sys, atexit; atexit.register(lambda: print({'numpy', 'numba'} & set(sys.modules)));"
        "from npser.train import main; main(['--help'])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.startswith("usage: python -m npser.train")
    assert result.stdout.splitlines()[-1] == "set()"


# --- bad use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--arch", "cnn", "--folds", "x"), "--folds"),
        (("--arch", "cnn", "--folds", "1"), "--folds"),
        (("--arch", "gru"), "--arch"),
        (("--arch", "cnn", "--vote", "both"), "--vote"),
        (("--arch", "cnn", "--only", "3"), "--only"),
        (("--arch", "cnn", "--epochs", "-2"), "--epochs"),
        (("--arch", "cnn", "--epochs", "0"), "--epochs"),
        (("--arch", "cnn", "--batch-size", "0"), "--batch-size"),
        (("--data", "demo"), "--arch"),
    ],
)
def test_wrong_option_is_named_with_status_2(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("npser.train: ")
    assert wanted in line


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        pytest.param(("--backend", "cuda"), "--backend cuda", marks=pytest.mark.skipif(has_gpu(), reason="has a GPU")),
        (("--save", "m.npz"), "--cv none"),
        (("--cv", "none", "--only", "0.0"), "--only"),
        (("--threads", "4096"), "--threads 4096"),
        (("--data", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--only", "0.7"), "--only 0.7"),
        (("--only", "1.0"), "--only 1.0"),
        (("--folds", "7"), "sadness has only 6"),
        (("--cv", "speaker"), "--cv speaker"),
        (("--cv", "none"), "--folds: there are no folds"),
        (("--cv", "none", "--save", "/nowhere/m.npz"), "/nowhere"),
        (("--cv", "none", "--save", "/"), "is no file"),
        (("--cv", "none", "--save", "m" * 240), "too long a name"),
        (("--test-data", ""), "--test-data: is empty"),
        (("--arch", "tdcnn", "--recipe", "best", "--share-windows", "2"), "--share-windows 2: windows move"),
        (("--cv", "none", "--save", "m" * 300), "too long a name"),
        (("--cv", "none", "--save", f"/tmp/{'m' * 300}/m.npz"), "is not there"),
        (("--test-data", "/nowhere/at/all"), "--test-data /nowhere/at/all: no such folder"),
    ],
)
def test_bad_use_is_one_line_and_leaves_no_result(arguments, wanted, tones, tmp_path):
    usual = WHOLE if arguments[1:3] == ("none", "--save") else SHORT
    with pytest.raises(UserError) as error:
        train.main([*usual, "--data", str(tones), "--out", str(tmp_path / "out"), *arguments])
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.csv"))


def damaged(path: Path, kind: str) -> None:
    """A wav that cannot be used."""
    t = np.arange(20000) / 16000
    wave = 0.3 * np.sin(2 * np.pi * 300 * t)
    if kind == "silent":
        wave[:] = 0
    elif kind == "empty":
        wave = wave[:0]
    elif kind == "nan":
        wave[500] = np.nan
    soundfile.write(path, wave, 16000, subtype="FLOAT" if kind == "nan" else "PCM_16")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:20000])
    elif kind == "text":
        path.write_text("this is no audio")


@pytest.mark.parametrize("kind", ["silent", "empty", "nan", "truncated", "text"])
def test_unusable_recording_is_named_with_status_2(kind, tmp_path):
    for n in range(4):
        write_tone(tmp_path / "corpus" / ("sadness", "happy")[n % 2] / f"{n}.wav", 200 + 300 * (n % 2))
    damaged(tmp_path / "corpus" / "happy" / "bad.wav", kind)
    result = run_module("npser.train", *SHORT, "--data", tmp_path / "corpus", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "bad.wav" in result.stderr
    write_tone(tmp_path / "corpus" / "happy" / "bad.wav", 700)  # as the line says
    assert run_module("npser.train", *SHORT, "--data", tmp_path / "corpus", "--out", tmp_path / "out").returncode == 0


def test_a_place_without_a_name_is_refused(tones, capsys):
    for option in ("--out", "--save"):
        with pytest.raises(SystemExit):
            train.main([*WHOLE, "--data", str(tones), option, ""])
        assert f"{option}: is empty" in capsys.readouterr().err


def test_a_link_that_leads_nowhere_is_found_before_training(tones, tmp_path):
    (tmp_path / "link.npz").symlink_to(tmp_path / "nowhere" / "x.npz")
    options = ["--cv", "none", "--out", str(tmp_path / "out"), "--save", str(tmp_path / "link.npz")]
    with pytest.raises(UserError, match="nowhere is not there"):
        train.main([*WHOLE, "--data", str(tones), *options])
    (tmp_path / "out" / "model.npz").mkdir()
    with pytest.raises(UserError, match="is no file"):
        train.main([*WHOLE, "--data", str(tones), *options[:-2]])


def test_unwritable_output_folder_is_named(tones, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run_module("npser.train", *SHORT, "--data", tones, "--out", tmp_path / "file" / "out")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / "file") in result.stderr


def test_other_file_names_in_emodb_are_skipped_named_and_counted(tmp_path):
    for n, emotion in enumerate("WTWT"):
        write_tone(tmp_path / "corpus" / f"03a0{n + 1}{emotion}a.wav", 200 + 400 * (emotion == "W"))
    write_tone(tmp_path / "corpus" / "holiday.wav", 300)
    command = ("--arch", "lstm", "--epochs", "1", "--folds", "2", "--repeats", "1", "--data", tmp_path / "corpus")
    result = run_module("npser.train", *command, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "holiday.wav: not an EMO-DB file name" in result.stderr
    assert "skipped 1 file in all" in result.stderr
    assert "1 epoch of windows" in result.stdout


def test_train_on_one_corpus_and_test_on_another(tones, tmp_path):
    for n in range(3):
        write_tone(tmp_path / "other" / "happy" / f"{n}.wav", 700 + n)
        write_tone(tmp_path / "other" / "sadness" / f"{n}.wav", 170 + n)
        write_tone(tmp_path / "other" / "calm" / f"{n}.wav", 170 + n)
    write_tone(tmp_path / "other" / "loose.wav", 170)
    options = ("--arch", "lstm", "--repeats", "1", "--epochs", "1", "--segment-hop", "40", "--out", tmp_path / "out")
    result = run_module("npser.train", *options, "--data", tones, "--test-data", tmp_path / "other")
    assert result.returncode == 0, result.stderr
    assert "20 utterances (14 to train on, 6 to test on), 2 emotions" in result.stdout
    assert "1 fold, training and test as given, x 1 repeat" in result.stdout
    first = result.stderr.splitlines()[0]
    assert first.startswith("skipped other/loose.wav")  # not hidden behind the emotion that only one of them has
    fold = json.loads((tmp_path / "out" / "folds" / "r0f0.json").read_text())
    assert sorted(u["file"] for u in fold["utterances"]) == [
        f"other/{emotion}/{n}.wav" for emotion in ("happy", "sadness") for n in range(3)
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["corpus"].endswith("-to-other")


def test_a_class_that_only_the_speaker_left_out_has_is_named(tmp_path, capsys):
    names = ("03a01Wa", "03a01Fa", "03a01Na", "08a01Wa", "08a01Fa", "08a01Wb", "08a01Fb")
    for n, name in enumerate(names):  # only speaker 03 is ever neutral
        write_tone(tmp_path / "c" / f"{name}.wav", 200 + 50 * n)
    options = ["--arch", "lstm", "--cv", "speaker", "--repeats", "1", "--epochs", "1", "--segment-hop", "80"]
    assert train.main([*options, "--data", str(tmp_path / "c"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("tests neutral, of which its training utterances have none") == 1


def test_a_split_needs_one_that_is_given(tones, tmp_path):
    other = shutil.copytree(tones, tmp_path / "other")
    for options, said in [
        (("--cv", "split"), "a .csv file with a column split"),
        (("--test-data", other, "--cv", "speaker"), "--cv speaker cannot be"),
        (("--test-data", other, "--folds", "3"), "makes one fold"),
        (("--test-data", tones), "has 14 of the recordings of --data"),
        (("--test-data", "demo"), "built-in corpus"),
    ]:
        with pytest.raises(UserError, match=said):
            train.main(["--arch", "lstm", "--data", str(tones), "--out", str(tmp_path), *map(str, options)])


def test_model_with_the_score_of_its_cross_validation_stored_as_float16(finished, tones, tmp_path):
    options = list(WHOLE)
    options += ["--data", tones, "--cv", "none", "--out", tmp_path / "out", "--save", tmp_path / "m.npz"]
    result = run_module("npser.train", *options, "--score-from", finished, "--storage", "float16")
    assert result.returncode == 0, result.stderr
    loss = re.search(r"float16: 0\.\d+ MB; another label than with float32 for \d of 14 training utt", result.stdout)
    assert loss
    assert "no probability changes by more than" in result.stdout
    model = load_model(tmp_path / "m.npz")
    assert model.params["lstm1.wx"].dtype == np.float32
    np.testing.assert_array_equal(
        model.params["lstm1.wx"].astype(np.float16).astype(np.float32), model.params["lstm1.wx"]
    )
    folds = [json.loads((finished / "folds" / f"r0f{f}.json").read_text())["confusion"]["sum"] for f in (0, 1)]
    matrix = np.sum(folds, axis=0)
    assert model.cross_validation["folds"] == 2
    assert model.cross_validation["uar"] == pytest.approx(np.mean(np.diagonal(matrix) / matrix.sum(axis=1)))
    assert model.training["corpus"] in result.stdout
    assert re.search(r"carries the score of .*: UAR \d+\.\d\d % in cross-validation \(2 folds\)\n", result.stdout)
    assert score_of({**model.cross_validation, "cv": "split"}).endswith(" % on a given test set")
    folder = RunFolder.open(finished)
    pack(folder.config, folder.load_folds(), tmp_path / "run.json.xz")
    packed = train._measured_score(tmp_path / "run.json.xz", dict(folder.config))
    assert packed["uar"] == model.cross_validation["uar"]
    majority = {**folder.config, "vote": "majority"}
    pack(
        majority,
        [with_wrong_majorities(r) for r in folder.load_folds()],
        tmp_path / "run.json.xz",
    )
    assert train._measured_score(tmp_path / "run.json.xz", majority) == packed  # the model decides by sum
    with pytest.raises(UserError, match="--vote majority: what --cv none saves decides by sum"):
        train.main([*map(str, options), "--vote", "majority"])


def with_wrong_majorities(result):
    """The same fold of two classes, by majority, and every majority for the other class."""
    truth = [result.labels.index(u.truth) for u in result.utterances]
    told = {"files": [u.file for u in result.utterances], "speakers": [u.speaker for u in result.utterances]}
    told |= {"probabilities": [u.probabilities for u in result.utterances], "majority": [1 - k for k in truth]}
    told |= {"epochs": result.epochs, "run": result.run, "labels": result.labels, "truth": truth}
    return fold_result(repeat=result.repeat, fold=result.fold, vote="majority", **told)


def test_a_model_on_everything_does_not_stand_in_the_way_of_its_cross_validation(finished, tones, tmp_path):
    usual = tmp_path / "runs" / f"lstm-{tones.name}-s0"
    shutil.copytree(finished, usual)
    before = sorted(path.name for path in usual.iterdir())
    options = ("--arch", "lstm", "--data", tones, "--cv", "none", "--epochs", "3", "--segment-hop", "40")
    result = run_module("npser.train", *options, "--score-from", usual, "--save", "m.npz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert load_model(tmp_path / "m.npz").cross_validation["folds"] == 2
    assert sorted(path.name for path in usual.iterdir()) == before
    assert (tmp_path / "runs" / f"lstm-{tones.name}-s0-all" / "config.json").exists()


def test_the_score_of_another_training_is_refused(finished, tones, tmp_path):
    other = tmp_path / "other"
    write_tone(other / "low" / "a.wav", 200)
    write_tone(other / "high" / "a.wav", 700)
    run = RunFolder.open(finished)
    pack({**run.config, "experiment": "windows-split"}, run.load_folds(), tmp_path / "leaks.json.xz")
    base = ["--arch", "lstm", "--data", str(tones), "--cv", "none", "--out", str(tmp_path / "o"), "--epochs", "3"]
    for options, said in [
        (["--segment-hop", "8", "--score-from", str(finished)], "differs from this one in segment_hop$"),
        (
            ["--segment-hop", "40", "--data", str(other), "--score-from", str(finished)],
            "differs from this one in utterances, audio, labels$",
        ),
        (["--segment-hop", "40", "--score-from", str(tmp_path)], "not a run folder"),
        (
            ["--segment-hop", "40", "--score-from", str(tmp_path / "leaks.json.xz")],
            "this one in experiment$",
        ),
        (["--cv", "stratified", "--storage", "float16"], "no single model"),
    ]:
        with pytest.raises(UserError, match=said):
            train.main([*base, *options])
