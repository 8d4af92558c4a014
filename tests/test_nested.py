"""Nested selection: chosen by development data alone, then tested; it resumes, and stands beside the frozen run."""

import numpy as np
import pytest

from bench import nested
from npser import crossval, train
from npser.errors import RunFailed, UserError
from npser.metrics import average_f1
from npser.recipes import NAMES, Recipe, describe, recipe_for
from npser.runfolder import RunFolder

SHORT = ("--arch", "lstm", "--folds", "2", "--repeats", "1", "--epochs", "2", "--segment-hop", "40", "--threads", "1")
CHOICE = ("--candidate", "standardisation=global", "--candidate", "segment_hop=60,batch_size=4")


@pytest.fixture(scope="module")
def frozen(tones, tmp_path_factory):
    out = tmp_path_factory.mktemp("frozen")
    train.main([*SHORT, "--data", str(tones), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def finished(tones, tmp_path_factory):
    out = tmp_path_factory.mktemp("nested")
    assert nested.main([*SHORT, *CHOICE, "--data", str(tones), "--out", str(out)]) == 0
    return out


def test_the_best_on_development_data_is_chosen(finished):
    folder = RunFolder.open(finished)
    assert len(folder.config["candidates"]) == 3
    for result in folder.load_folds():
        scores = result.run["scores"]
        assert len(scores) == 3
        assert result.run["chosen"] == int(np.argmax(scores))


def test_a_frozen_run_that_is_not_there_is_missed_before_anything_is_computed(tones, tmp_path):
    with pytest.raises(UserError, match="absent: "):
        nested.main([*SHORT, *CHOICE, "--data", str(tones), "--out", str(tmp_path / "out"), "--frozen", "absent"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(("--seed", "5"), "--frozen .*: another experiment.* in seed"), (("--only", "1.0"), "--only 1.0: ")],
)
def test_what_cannot_be_is_said_before_anything_is_computed(wrong, said, tones, frozen, tmp_path):
    with pytest.raises(UserError, match=said):
        nested.main(
            [*SHORT, *CHOICE, "--data", str(tones), "--out", str(tmp_path / "out"), "--frozen", str(frozen), *wrong]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("winner", [0, 1, 2])
def test_whichever_wins_is_what_is_trained(winner, tones, tmp_path, monkeypatch, frozen):
    scores = iter([float(n == winner) for n in range(3)])
    trained, train_and_test = [], crossval.train_and_test

    def noting(corpus, spoken, fold, settings, *rest):
        trained.append(describe(settings.recipe))
        return train_and_test(corpus, spoken, fold, settings, *rest)

    monkeypatch.setattr(nested, "development_score", lambda *_: next(scores))
    monkeypatch.setattr(crossval, "train_and_test", noting)
    nested.main([*SHORT, *CHOICE, "--data", str(tones), "--out", str(tmp_path), "--only", "0.0"])
    assert trained == [RunFolder.open(tmp_path).config["candidates"][winner]]
    ours = RunFolder.open(tmp_path).load_fold(0, 0)
    plain = RunFolder.open(frozen).load_fold(0, 0)
    same = [u.probabilities for u in ours.utterances] == [u.probabilities for u in plain.utterances]
    assert same == (winner == 0)


def test_the_choice_never_sees_the_test_fold(tones, tmp_path, monkeypatch):
    seen = []
    split = nested.development_score

    def watched(corpus, spoken, fold, settings, progress):
        blind = [x if i in set(fold.train.tolist()) else np.full_like(x, np.nan) for i, x in enumerate(spoken[0])]
        seen.append(split(corpus, [blind], fold, settings, progress))
        assert split(corpus, spoken, fold, settings, progress) == seen[-1]
        return seen[-1]

    monkeypatch.setattr(nested, "development_score", watched)
    nested.main([*SHORT, *CHOICE, "--data", str(tones), "--out", str(tmp_path), "--only", "0.1"])
    assert len(seen) == 3


def test_the_table_stands_beside_the_frozen_run(finished, frozen, tones, capsys):
    arguments = [*SHORT, *CHOICE, "--data", str(tones), "--out", str(finished), "--frozen", str(frozen)]
    assert nested.main(arguments) == 0  # nothing left to compute
    printed = capsys.readouterr().out
    theirs = [average_f1(r.matrix("sum")) for r in RunFolder.open(frozen).load_folds()]
    assert f"{100 * np.mean(theirs):.2f}" in printed.splitlines()[-1]


def test_a_candidate_that_diverges_is_not_chosen(tones, tmp_path, monkeypatch):
    outcomes = iter([RunFailed("the training diverged"), 0.2, 0.1])

    def score(*_):
        if isinstance(outcome := next(outcomes), RunFailed):
            raise outcome
        return outcome

    monkeypatch.setattr(nested, "development_score", score)
    nested.main([*SHORT, *CHOICE, "--data", str(tones), "--out", str(tmp_path), "--only", "0.0"])
    run = RunFolder.open(tmp_path).load_fold(0, 0).run
    assert (run["chosen"], run["scores"]) == (1, [0.0, 0.2, 0.1])


def test_folds_that_the_frozen_choice_was_made_on_come_last(tones, tmp_path, monkeypatch):
    done, save = [], RunFolder.save_fold
    monkeypatch.setattr(nested, "development_score", lambda *_: 1.0)
    monkeypatch.setattr(RunFolder, "save_fold", lambda self, result: (done.append(result.fold), save(self, result)))
    four = ("--folds", "4", "--epochs", "1", "--segment-hop", "80")
    nested.main([*SHORT, *four, *CHOICE, "--data", str(tones), "--out", str(tmp_path)])
    assert done == [0, 3, 1, 2]


def test_candidates_are_changes_of_the_recipe_and_of_each_other():
    for name in NAMES:
        for arch in ("cnn", "lstm", "tdcnn"):
            recipe = recipe_for(name, arch, False, {})
            made = nested.candidates(recipe, nested.usual_changes(name, recipe))
            assert len(made) > 1
            assert made[0] == recipe
    assert nested.candidates(Recipe(), ["speeds=0.9,1.1,epochs=3"])[1] == Recipe(speeds=(0.9, 1.1), epochs=3)
    for change, said in (
        ("epochs=1", "--candidate epochs=1: changes nothing"),
        ("epochs", "--candidate epochs: FIELD=VALUE"),
        ("epochs=many", "--candidate epochs=many: int"),
        ("colour=red", "--candidate colour: a recipe has"),
    ):
        with pytest.raises(UserError, match=said):
            nested.candidates(Recipe(), [change])
    with pytest.raises(UserError, match="nothing to choose among"):
        nested.main(["--arch", "lstm", "--recipe", "best", "--epochs", "8"])


def test_another_frozen_run_is_refused(finished, frozen, tones, tmp_path):
    train.main([*SHORT, "--data", str(tones), "--out", str(tmp_path), "--seed", "5"])
    with pytest.raises(UserError, match="seed"):
        nested.frozen_folds(tmp_path, RunFolder.open(finished).config)
