"""The leakage experiments: that each does what its name says, and the honest one is that of npser.train."""

import json
from collections import Counter

import numpy as np
import pytest

from bench import leakage
from npser import train
from npser.corpus import open_corpus
from npser.crossval import make_folds
from npser.errors import UserError
from npser.foldresult import fold_result
from npser.frontend import read_frames
from npser.metrics import average_f1
from npser.progress import Progress
from npser.runfolder import RunFolder

SHORT = ("--folds", "2", "--repeats", "1", "--epochs", "2", "--segment-hop", "8", "--threads", "1")


@pytest.fixture(scope="module")
def material(tones):
    corpus = open_corpus(str(tones))
    return corpus, read_frames(corpus, "cpu")


@pytest.fixture(scope="module")
def finished(tones, tmp_path_factory):
    out = tmp_path_factory.mktemp("leakage")
    assert leakage.main(["--arch", "lstm", "--data", str(tones), *SHORT, "--out", str(out)]) == 0
    return out


def test_copies_of_a_test_utterance_are_in_training(material):
    corpus, frames = leakage.repeated(*material, seed=0)
    assert Counter(u.emotion for u in corpus.utterances) == {"sadness": 8, "happy": 8}
    assert len({u.name for u in corpus.utterances}) == 16
    originals = [u.name.split("+")[0] for u in corpus.utterances]
    by_name = dict(zip([u.name for u in material[0].utterances], material[1], strict=True))
    assert all(by_name[name] is x for name, x in zip(originals, frames, strict=True))
    leaks = 0
    for fold in make_folds(corpus, "stratified", 2, 3, 0):
        leaks += len({originals[i] for i in fold.test} & {originals[i] for i in fold.train})
    assert leaks > 0


def test_windows_of_one_recording_are_on_both_sides(material):
    corpus, frames = leakage.cut(*material, length=128, hop=4)
    name = material[0].utterances[0].name
    own = [i for i, u in enumerate(corpus.utterances) if u.name.startswith(name + "@")]
    x = material[1][0]
    assert len(own) == 1 + (len(x) - 128) // 4
    for n, i in enumerate(own):
        np.testing.assert_array_equal(frames[i], x[4 * n : 4 * n + 128])
    fold = make_folds(corpus, "stratified", 2, 1, 0)[0]
    assert set(own) & set(fold.test)
    assert set(own) & set(fold.train)


def test_windows_of_an_utterance_decide_together(finished):
    single = RunFolder.open(finished / "windows-split").load_fold(0, 0)
    together = RunFolder.open(finished / "windows-split-voted").load_fold(0, 0)
    assert {u.file for u in together.utterances} == {u.file.split("@")[0] for u in single.utterances}
    assert len(single.utterances) > len(together.utterances)
    for u in together.utterances:
        own = [w.probabilities for w in single.utterances if w.file.split("@")[0] == u.file]
        np.testing.assert_allclose(u.probabilities, np.mean(own, axis=0), rtol=1e-5)


def test_every_part_of_an_utterances_windows_decides_alone(finished):
    windows = {"a.wav": 7, "b.wav": 1, "c.wav": 4}
    names = [f"{file}@{8 * n}" for file, count in windows.items() for n in range(count)]
    p = np.random.default_rng(0).dirichlet(np.ones(2), size=len(names))
    decided = {"probabilities": p, "majority": p.argmax(axis=1), "epochs": (), "run": {}}
    told = {"speakers": [""] * len(names), "truth": [int(name[0] != "a") for name in names], "files": names}
    single = fold_result(repeat=0, fold=3, labels=("calm", "joy"), vote="sum", **decided, **told)
    parts = leakage.voted_in_parts(single, 3, seed=0)
    assert Counter(u.file.split("@")[0] for u in parts.utterances) == {"a.wav": 3, "b.wav": 1, "c.wav": 3}
    assert {u.file: u.truth for u in parts.utterances}["c.wav@2"] == "joy"
    for file, sizes in {"a.wav": (3, 2, 2), "b.wav": (1,), "c.wav": (2, 1, 1)}.items():
        own = [next(u.probabilities for u in parts.utterances if u.file == f"{file}@{n}") for n in range(len(sizes))]
        whole = p[[name.startswith(file) for name in names]].mean(axis=0)  # every window is in one part
        np.testing.assert_allclose(np.average(own, axis=0, weights=sizes), whole)
    assert leakage.voted_in_parts(single, 3, seed=1).utterances != parts.utterances
    scored, few = (RunFolder.open(finished / name).load_fold(0, 0) for name in ("windows-scored", "few-windows-voted"))
    assert few.utterances == leakage.voted_in_parts(scored, 2, seed=0).utterances


def test_whoever_decides_anew_is_recorded_and_whoever_trained_too(finished, tmp_path):
    folders = {n: RunFolder.open(finished / n) for n in ("windows-split", "windows-scored")}
    for name in ("windows-split-voted", "few-windows-voted"):
        folders[name] = RunFolder.open_or_create(tmp_path / name, folders["windows-split"].config)
    trained = folders["windows-scored"].load_fold(0, 0).run
    leakage.derive(folders, 2, 0, {"versions": {"commit": "another"}, "machine": "elsewhere"})
    told = folders["few-windows-voted"].load_fold(0, 0).run
    assert (told["versions"], told["machine"]) == ({"commit": "another"}, "elsewhere")
    assert told["also_by"] == [f"{trained['versions']['commit']} on {trained['machine']}, which trained"]
    assert leakage.decided_by(trained, trained) == trained


def test_a_fold_that_is_not_there_is_refused(tones, tmp_path):
    with pytest.raises(UserError, match=r"--only 1\.0: there are repeats 0 to 0 and folds 0 to 1"):
        leakage.main(["--arch", "lstm", "--data", str(tones), *SHORT, "--only", "1.0", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_honest_experiment_is_what_the_ordinary_command_does(finished, tones, tmp_path):
    train.main(["--arch", "lstm", "--data", str(tones), *SHORT, "--out", str(tmp_path)])
    for fold in (0, 1):
        ours = RunFolder.open(finished / "honest").load_fold(0, fold)
        theirs = RunFolder.open(tmp_path).load_fold(0, fold)
        assert ours.utterances == theirs.utterances
        best = RunFolder.open(finished / "best-epoch").load_fold(0, fold)
        assert average_f1(best.matrix("sum")) >= average_f1(ours.matrix("sum"))
        windows = RunFolder.open(finished / "windows-scored").load_fold(0, fold)
        for u in ours.utterances:
            own = [w.probabilities for w in windows.utterances if w.file.rsplit("@", 1)[0] == u.file]
            np.testing.assert_allclose(u.probabilities, np.mean(own, axis=0), rtol=1e-5)


def test_a_change_is_told_over_common_folds(finished):
    """An interrupted run has a fold more of one experiment than of another."""
    runs = [(f.path, f.config, f.load_folds()) for f in (RunFolder.open(finished / n) for n in leakage.EXPERIMENTS)]
    for fold in (0, 1):
        cut = [(p, c, r if c["experiment"] == "honest" else [r[fold]]) for p, c, r in runs]
        shown = {row[0]: row for row in leakage.table(cut).rows}
        honest, best = (
            average_f1(RunFolder.open(finished / n).load_fold(0, fold).matrix("sum")) for n in ("honest", "best-epoch")
        )
        assert shown["best-epoch"][3:5] == ("honest", f"{100 * (best - honest):+.2f}")
        assert shown["honest"][3:5] == ("-", "-")
    folds = {
        n: [100 * average_f1(r.matrix("sum")) for r in results] for (_, c, results) in runs for n in [c["experiment"]]
    }
    shown = {row[0]: row for row in leakage.table(runs).rows}
    for split, equal in leakage.EQUALS.items():
        assert shown[split][3:5] == (equal, f"{np.mean(np.subtract(folds[split], folds[equal])):+.2f}")


def test_the_same_command_again_computes_only_what_is_missing(finished, tones, monkeypatch, capsys):
    lost = finished / "oversampled-first" / "folds" / "r0f1.json"
    before = json.loads(lost.read_text())
    lost.unlink()

    def refuse(*_):
        raise AssertionError("nothing is missing there")

    monkeypatch.setattr(leakage, "train_and_look", refuse)
    assert leakage.main(["--arch", "lstm", "--data", str(tones), *SHORT, "--out", str(finished)]) == 0
    assert json.loads(lost.read_text())["utterances"] == before["utterances"]
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in leakage.EXPERIMENTS)


def test_a_fold_of_every_experiment_comes_before_the_next_fold(tones, tmp_path, monkeypatch):
    begun, begin = [], Progress.begin_fold

    def seen(self, title, steps):
        begun.append(title)
        begin(self, title, steps)

    monkeypatch.setattr(Progress, "begin_fold", seen)
    options = ["--epochs", "1", "--segment-hop", "80"]
    assert leakage.main(["--arch", "lstm", "--data", str(tones), *SHORT, *options, "--out", str(tmp_path)]) == 0
    assert begun == [f"{training} 0.{fold}" for fold in (0, 1) for training in leakage.TRAININGS]
