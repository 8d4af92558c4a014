"""A published fold, computed again."""

import re
from dataclasses import replace

import numpy as np
import pytest

from bench import again, publish
from npser import train
from npser.errors import UserError
from npser.metrics import confusion_matrix
from npser.packed import SUFFIX, pack, unpack
from npser.runfolder import RunFolder

SHORT = ("--arch", "lstm", "--folds", "2", "--repeats", "2", "--epochs", "2", "--segment-hop", "40", "--seed", "5")


@pytest.fixture(scope="module")
def published(tones, tmp_path_factory):
    """Two folds of four, packed."""
    folder = tmp_path_factory.mktemp("published")
    for fold in ("0.0", "1.1"):
        assert train.main([*SHORT, "--data", str(tones), "--only", fold, "--out", str(folder / "run")]) == 0
    run = RunFolder.open(folder / "run")
    file = folder / f"{publish.name_of(run.config)}{SUFFIX}"
    pack(run.config, run.load_folds(), file)
    return file


@pytest.fixture
def compute(tones, tmp_path, monkeypatch):
    """`bench.again` on that corpus, where runs/ is empty."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: again.main([*map(str, arguments), "--data", str(tones)])


def test_an_equal_fold(compute, published, tones, tmp_path, capsys):
    assert compute(published, "--fold", "1.1") == 0
    out = capsys.readouterr().out
    assert f"python -m bench.again {published} --fold 1.1 --data={tones}" in out
    assert re.search(r"^training loss, last epoch  .*  0 at most, of all epochs$", out, re.MULTILINE)
    assert re.search(r"^decisions  .*  0 otherwise$", out, re.MULTILINE)
    assert re.search(r"^probabilities  .*  0 at most$", out, re.MULTILINE)
    folder = RunFolder.open(tmp_path / "runs" / f"again-{published.name.removesuffix(SUFFIX)}")
    assert folder.finished() == [(1, 1)]
    with pytest.raises(UserError, match=r"fold 1\.1 was computed there before"):
        compute(published, "--fold", "1.1")


def test_one_is_drawn(published):
    drawn = {(r.repeat, r.fold) for _, r in (again.draw([published], None) for _ in range(60))}
    assert drawn == {(0, 0), (1, 1)}


def test_another_fold_than_the_published(compute, published, tmp_path, capsys):
    """Other losses and another decision are shown, and the decision is the exit status."""
    packed = unpack(published)
    fold = packed.folds[0]
    first, *others = fold.utterances
    decision = fold.labels[1 - fold.labels.index(first.prediction)]
    first = replace(first, prediction=decision, majority=decision, probabilities=first.probabilities[::-1])
    truth, decided = (
        [fold.labels.index(getattr(u, what)) for u in (first, *others)] for what in ("truth", "prediction")
    )
    matrix = confusion_matrix(np.array(truth), np.array(decided), 2).tolist()
    epochs = tuple(replace(epoch, loss=epoch.loss + 0.5) for epoch in fold.epochs)
    changed = replace(fold, utterances=(first, *others), confusion={"sum": matrix, "majority": matrix}, epochs=epochs)
    pack(packed.config, [changed], tmp_path / f"changed{SUFFIX}")
    assert compute(tmp_path / f"changed{SUFFIX}") == 1
    out = capsys.readouterr().out
    assert "0.5 at most, of all epochs" in out
    assert "1 otherwise" in out


def test_what_cannot_be_computed_again(compute, published, tmp_path):
    with pytest.raises(UserError, match=r"no finished fold 0\.1 is published there"):
        compute(published, "--fold", "0.1")
    packed = unpack(published)
    for changes in ({"seed": 6, "floor": 1}, {"experiment": "honest"}):
        other = tmp_path / f"other{SUFFIX}"
        pack({**packed.config, **changes}, packed.load_folds(), other)
        with pytest.raises(UserError, match=r"floor was 1|no finished fold"):
            compute(other, "--fold", "0.0")
    before = {**packed.config, "training": {**packed.config["training"], "label_smoothing": 0.3}}
    pack(before, packed.load_folds(), other)
    with pytest.raises(UserError, match="made with another label_smoothing than its recipe has now"):
        compute(other, "--fold", "0.0")
    drawn = [again.draw([other, published], None)[0].path for _ in range(20)]
    assert set(drawn) == {published}
