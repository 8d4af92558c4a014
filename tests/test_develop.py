"""Development trials: what they read, what they write, and that none is computed twice."""

import csv
import re
import subprocess

import numpy as np
import pytest

from bench import develop
from npser import crossval
from npser.cli import commit_of
from npser.errors import RunFailed, UserError
from npser.features import Standardisation, WindowSet
from npser.models import build_model

SMALL = (
    "--arch",
    "lstm",
    "--folds",
    "2",
    "--threads",
    "1",
    "--share",
    "0.4",
    "--set",
    "epochs=2",
    "--set",
    "segment_hop=40",
)


@pytest.fixture
def table(tmp_path):
    return tmp_path / "trials.csv"


def run(tones, table, *arguments):
    return develop.main([*SMALL, "--data", str(tones), "--table", str(table), *arguments])


def test_every_epoch_of_every_trial_is_a_line(tones, table, capsys):
    assert run(tones, table, "--fold", "0,1", "--seeds", "3", "--set", "standardisation=global", "--note", "so") == 0
    lines = list(csv.DictReader(table.open()))
    assert [(line["fold"], line["seed"], line["epoch"]) for line in lines] == [
        ("0.0", "3", "1"), ("0.0", "3", "2"), ("0.1", "3", "1"), ("0.1", "3", "2"),
    ]  # fmt: skip
    assert all(line["note"] == "so" and "standardisation=global" in line["settings"] for line in lines)
    assert all(0 <= float(line[name]) <= 1 for line in lines for name in ("uar", "f1", "uar_majority", "f1_mean"))
    printed = capsys.readouterr().out
    late = 100 * np.mean([float(line["f1"]) for line in lines])  # two epochs: both are late
    assert f"{late:.1f}" in printed


def test_a_trial_that_the_table_has_is_not_computed_again(tones, table, monkeypatch):
    run(tones, table)
    before = table.read_text()
    run(tones, table, "--seeds", "0,1")
    assert table.read_text().startswith(before)
    assert len(table.read_text().splitlines()) == 5

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(crossval, "prepare", refuse)
    run(tones, table, "--seeds", "0,1")
    assert run(tones, table, "--summary", "--set", "epochs=50") == 0  # computes nothing either
    with pytest.raises(AssertionError, match="again"):
        run(tones, table, "--seeds", "2")


@pytest.mark.parametrize(
    "augmented",
    [
        (),
        ("--set", "moving=True", "--set", "speeds=0.9,1.1"),
        ("--set", "moving=True", "--variant", "noise", "--variant", "speeds-scoring", "--variant", "utterance"),
    ],
)
def test_test_utterances_are_never_read(tones, table, monkeypatch, augmented):
    """Blanked out in what a trial is given, they change nothing."""
    run(tones, table, *augmented)
    prepare, folds = crossval.prepare, {}
    make = crossval.make_folds

    def watched(*arguments):
        folds["made"] = make(*arguments)
        return folds["made"]

    def blind(spoken, *rest):
        test = set(folds["made"][0].test.tolist())
        for frames in spoken:
            frames[:] = [np.full_like(x, np.nan) if i in test else x for i, x in enumerate(frames)]
        return prepare(spoken, *rest)

    monkeypatch.setattr(crossval, "make_folds", watched)
    monkeypatch.setattr(crossval, "prepare", blind)
    other = table.with_name("blind.csv")
    run(tones, other, *augmented)
    numbers = [[line | {"seconds": ""} for line in csv.DictReader(path.open())] for path in (table, other)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    "wrong",
    [
        *(("--set", "epochs"), ("--set", "epoch=3"), ("--set", "epochs=x"), ("--fold", "0,2"), ("--fold", "5-2")),
        *(("--share", "1"), ("--share", "a"), ("--table", "absent/trials.csv")),
        *(("--variant", "louder"), ("--variant", "noise")),  # noise is for recipes with augmentation
        ("--set", "average_last=2"),  # the mean weights have columns of their own
    ],
)
def test_a_wrong_option_is_refused(tones, table, wrong, capsys):
    with pytest.raises((UserError, SystemExit)) as refused:
        run(tones, table, *wrong)
    assert wrong[0] in f"{refused.value}{capsys.readouterr().err}"
    assert not table.exists()


@pytest.mark.parametrize("content", [b"arch,epoch\nlstm,1\n", b"# Results\n", b"", b"\xff\xfe"])
def test_what_is_no_table_is_refused(table, content):
    table.write_bytes(content)
    with pytest.raises(UserError, match=r"trials\.csv: cannot be read as a table of trials"):
        develop.main(["--arch", "lstm", "--summary", "--table", str(table)])


def test_a_variant_is_another_trial(tones, table, monkeypatch):
    """What it changes reaches the training and the scoring, and whatever their order, it is one trial."""
    seen = []

    def watched(model, task, held_out, targets, progress):
        seen.append((model, task, held_out))
        yield {"epoch": 1}

    monkeypatch.setattr(develop, "_epochs", watched)

    def trial(*arguments):
        develop.main([*arguments, "--folds", "2", "--data", str(tones), "--table", str(table), "--threads", "1"])
        return [line["settings"] for line in develop.read(table)]

    cnn = ("--arch", "cnn", "--recipe", "best")
    (usual,) = trial(*cnn)
    names = ("he", "noise", "speeds-scoring")
    settings = trial(*cnn, *(word for name in names for word in ("--variant", name)))
    assert settings == [usual, f"{usual} variant=he variant=noise variant=speeds-scoring"]
    assert trial(*cnn, *(word for name in reversed(names) for word in ("--variant", name))) == settings
    (plain, task, once), (changed, with_noise, thrice) = seen
    w = [model.params["conv2.w"] for model in (plain, changed)]
    np.testing.assert_allclose(w[1], w[0] * np.sqrt(2), rtol=1e-6)
    assert (len(task.windows.versions), len(with_noise.windows.versions)) == (3, 4)
    assert [len(held_out) for held_out in (once, thrice)] == [1, 3]
    normal, slower, faster = (len(windows.everything) for windows in thrice)
    assert slower > normal > faster


def test_all_windows_at_all_speeds_vote(tones):
    model = build_model("lstm", hidden=4, classes=2, seed=1)
    flat = Standardisation(np.zeros(128, np.float32), np.ones(128, np.float32))
    rng = np.random.default_rng(0)
    sets = [
        WindowSet([rng.normal(0, 9, (n, 128)).astype(np.float32) for n in lengths], flat, 128, 16)
        for lengths in ((140, 200), (180, 130))
    ]
    votes = develop._heard(model, sets)
    p = [model.predict_proba(windows.batch(np.arange(len(windows)))) for windows in sets]
    for utterance in (0, 1):
        own = np.concatenate([q[windows.owner == utterance] for q, windows in zip(p, sets, strict=True)])
        np.testing.assert_allclose(votes.probabilities[utterance], own.mean(axis=0), rtol=1e-5)
        ballots = np.bincount(own.argmax(axis=1), minlength=2)
        assert ballots[votes.majority[utterance]] == ballots.max()


def test_a_trial_that_diverges_is_in_the_table(tones, table, monkeypatch, capsys):
    real = develop._epochs

    def diverging(*arguments):
        yield next(iter(real(*arguments)))
        raise RunFailed("fold 0.0: the training diverged")

    monkeypatch.setattr(develop, "_epochs", diverging)
    assert run(tones, table) == 0
    first, last = csv.DictReader(table.open())
    assert (first["epoch"], last["epoch"], last["f1"], last["settings"]) == ("1", "2", "", first["settings"])
    assert re.search(r"epochs=2 .*  -  ", capsys.readouterr().out)
    before = table.read_text()
    assert run(tones, table) == 0
    assert table.read_text() == before


def test_trials_of_another_corpus_or_of_other_folds_are_others(tones, table, capsys):
    run(tones, table)
    lines = develop.read(table)
    develop.append(table, [line | {"corpus": "elsewhere", "f1": "0.99"} for line in lines])
    develop.append(table, [line | {"folds": "9", "f1": "0.98"} for line in lines])
    capsys.readouterr()
    run(tones, table, "--summary")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 3
    assert sum("99.0" in row for row in rows) == 1


def test_the_mean_weights_of_a_recipe_are_told_by_their_own_columns(tones, table):
    run(tones, table, "--recipe", "best")  # whose weights are a mean
    run(tones, table, "--recipe", "best")
    lines = develop.read(table)
    assert len(lines) == 2  # the second is the same trial
    assert "average_last" not in lines[0]["settings"]


def test_the_shipped_table_is_whole():
    lines = develop.read(develop.TABLE)
    assert tuple(lines[0]) == develop.COLUMNS
    trials = {}
    for line in lines:
        trials.setdefault(tuple(line[name] for name in develop.KEY), []).append(int(line["epoch"]))
    assert all(epochs == list(range(1, len(epochs) + 1)) for epochs in trials.values())


def test_a_trial_in_the_table_does_not_make_the_commit_dirty(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    assert commit_of(tmp_path) is None
    measured, code = tmp_path / "bench/results/development.csv", tmp_path / "npser/code.py"
    for file in (measured, code):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    assert commit_of(tmp_path) == commit
    measured.write_text("2\n")
    assert commit_of(tmp_path) == commit
    code.write_text("2\n")
    assert commit_of(tmp_path) == f"{commit}-dirty"
