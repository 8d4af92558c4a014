import csv
import errno
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from npser import runfolder
from npser.errors import RunFailed, UserError
from npser.files import write_atomically
from npser.foldresult import EpochResult, FoldResult, fold_result
from npser.runfolder import MAY_CHANGE, RunFolder

LABELS = ["neutral", "anger", "fear"]
CONFIG = {
    "arch": "cnn",
    "corpus": "emodb",
    "labels": LABELS,
    "folds": 2,
    "repeats": 2,
    "epochs": 8,
    "cv": "stratified",
    "vote": "sum",
    "seed": 0,
    "features": {"hop": 128, "floor": 1e-5},
}


def make_fold(repeat=0, fold=0, vote="sum", files=("b.wav", "a.wav", 'c "loud", late.wav')):
    """Three utterances: neutral, anger, anger. By sum: neutral, anger, fear; by majority: neutral, fear, fear."""
    return fold_result(
        repeat=repeat,
        fold=fold,
        labels=LABELS,
        vote=vote,
        epochs=[EpochResult(1, 1.5, 0.25, 2.0), EpochResult(2, 0.5, 0.75, 2.5)],
        files=files,
        speakers=["03", "", "08"],
        truth=[0, 1, 1],
        probabilities=[[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [1 / 3, 1 / 6, 1 / 2]],
        majority=np.array([0, 2, 2]),
        run={"backend": "cpu", "threads": 2, "versions": {"numpy": "2.0"}},
    )


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# --- writing whole or not at all -------------------------------------------------------------------------------------


def test_write_atomically_writes_and_replaces(tmp_path):
    path = tmp_path / "report.md"
    write_atomically(path, "één\n")
    assert path.read_bytes() == "één\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["report.md"]


def test_write_atomically_keeps_the_bytes_of_odd_file_names(tmp_path):
    name = b"caf\xe9.wav".decode("utf-8", errors="surrogateescape")
    write_atomically(tmp_path / "x.csv", name)
    assert (tmp_path / "x.csv").read_bytes() == b"caf\xe9.wav"


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("failure", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunFailed, "No space left.*free some space"),
        (OSError(errno.EIO, "Input/output error"), RunFailed, "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), UserError, "cannot be written.*--out"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, failure, raised, said):
    path = tmp_path / "r0f0.json"
    path.write_text("old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(raised, match=said) as caught:
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r0f0.json"]
    if raised is not KeyboardInterrupt:
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_content_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, os_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), os_replace(a, b)))
    write_atomically(tmp_path / "x", "12345")
    assert calls == [5, "replace"]


def test_write_atomically_into_a_missing_folder(tmp_path):
    with pytest.raises(RunFailed, match="its folder is gone"):
        write_atomically(tmp_path / "missing" / "x", "text")


# --- one fold --------------------------------------------------------------------------------------------------------


def test_fold_result_holds_both_votes():
    result = make_fold()
    assert result.confusion["sum"] == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert result.confusion["majority"] == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert result.matrix("majority").tolist() == result.confusion["majority"]
    assert [utterance.prediction for utterance in result.utterances] == ["neutral", "anger", "fear"]
    by_majority = make_fold(vote="majority")
    assert [utterance.prediction for utterance in by_majority.utterances] == ["neutral", "fear", "fear"]
    assert by_majority.confusion == result.confusion


@pytest.mark.parametrize("vote", ["sum", "majority"])
def test_fold_survives_json(vote):
    result = make_fold(1, 7, vote)
    text = result.to_json()
    assert FoldResult.from_json(text, "x") == result
    assert FoldResult.from_json(text, "x").to_json() == text


def test_fold_json_is_what_is_documented():
    content = json.loads(make_fold(1, 7).to_json())
    assert (content["repeat"], content["fold"], content["labels"], content["vote"]) == (1, 7, LABELS, "sum")
    assert content["confusion"]["sum"] == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert content["epochs"][1] == {"epoch": 2, "loss": 0.5, "accuracy": 0.75, "seconds": 2.5}
    assert content["utterances"][1] == {
        "file": "a.wav",
        "speaker": "",
        "truth": "anger",
        "prediction": "anger",
        "majority": "fear",
        "probabilities": {"neutral": 0.1, "anger": 0.5, "fear": 0.4},
    }
    assert content["run"] == {"backend": "cpu", "threads": 2, "versions": {"numpy": "2.0"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"truth": [0, 1, -1]}, "truth runs from -1 to 1"),
        ({"majority": [0, 1, 3]}, "predicted runs from 0 to 3"),
        ({"probabilities": [[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [1, 0, float("nan")]]}, "finite probability"),
        ({"probabilities": [[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]]}, "one finite probability for each label"),
        ({"files": ["a.wav", "b.wav", "a.wav"]}, "utterance occurs twice"),
        ({"files": ["a.wav", "b.wav"]}, "argument"),
        ({"vote": "mean"}, "neither sum nor majority"),
        ({"epochs": [EpochResult(1, float("nan"), 0.5, 1.0)]}, "not finite"),
        ({"labels": ["neutral", "anger", "anger"]}, "a label occurs twice"),
        ({"fold": -1}, "count from 0"),
    ],
)
def test_fold_result_refuses_what_does_not_fit(changes, said):
    arguments = {
        "repeat": 0,
        "fold": 0,
        "labels": LABELS,
        "vote": "sum",
        "epochs": [],
        "files": ["a.wav", "b.wav", "c.wav"],
        "speakers": ["", "", ""],
        "truth": [0, 1, 1],
        "probabilities": [[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6]],
        "majority": [0, 1, 2],
        "run": {},
    }
    fold_result(**arguments)  # fits
    with pytest.raises(ValueError, match=said):
        fold_result(**arguments | changes)


def damaged_texts():
    good = json.loads(make_fold().to_json())

    def changed(**changes):
        return json.dumps(good | changes)

    utterance = good["utterances"][0]
    other = [utterance | {"truth": "anger"}, *good["utterances"][1:]]
    return {
        "": "Expecting value",
        make_fold().to_json()[:300]: "damaged",
        "[1, 2]": "damaged",
        "null": "damaged",
        json.dumps({key: value for key, value in good.items() if key != "labels"}): "'labels' is missing",
        changed(repeat="0"): "'0' is not an integer",
        changed(fold=True): "True is not an integer",
        changed(utterances=other): "do not agree with the utterances",
        changed(utterances=[utterance | {"prediction": "fear"}]): "the prediction 'fear' is not the one by sum",
        changed(utterances=[utterance | {"truth": "joy"}]): "'joy' is none of the labels",
        changed(utterances=[utterance | {"probabilities": {"neutral": 1.0}}]): "'anger' is missing",
        changed(epochs=[{"epoch": 1}]): "'loss' is missing",
        changed(confusion=3): "damaged",
    }


@pytest.mark.parametrize(("text", "said"), damaged_texts().items())
def test_a_damaged_fold_is_named(text, said):
    with pytest.raises(UserError, match=said) as caught:
        FoldResult.from_json(text, "runs/x/folds/r0f0.json")
    assert str(caught.value).startswith("runs/x/folds/r0f0.json: damaged (")
    assert "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_create_writes_the_configuration(tmp_path):
    folder = RunFolder.open_or_create(tmp_path / "runs" / "x", CONFIG)
    assert json.loads((tmp_path / "runs" / "x" / "config.json").read_text()) == CONFIG
    assert folder.finished() == []
    assert RunFolder.open(tmp_path / "runs" / "x") == folder


def test_resuming_with_the_same_options(tmp_path):
    RunFolder.open_or_create(tmp_path, CONFIG | {"labels": tuple(LABELS)})
    before = (tmp_path / "config.json").stat().st_mtime_ns
    assert RunFolder.open_or_create(tmp_path, CONFIG).config == CONFIG
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


def test_every_difference_is_named_with_both_values(tmp_path):
    RunFolder.open_or_create(tmp_path, CONFIG | {"batch_size": 32, "recipe": "best"})
    before = (tmp_path / "config.json").read_bytes()
    (tmp_path / "folds" / "r0f0.checkpoint.npz").write_bytes(b"state")
    changes = {"epochs": 10, "batch_size": 16, "features": {"hop": 64, "floor": 1e-5}, "segment_hop": 8}
    with pytest.raises(UserError) as caught:
        RunFolder.open_or_create(tmp_path, CONFIG | changes, may_change={"vote"})
    assert str(caught.value) == (
        f"{tmp_path}: --epochs was 8, now 10; features.hop was 128, now 64; --batch-size was 32, now 16; "
        "--recipe was best, now not set; --segment-hop was not set, now 8: "
        "use another --out, or the same options to resume"
    )
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_that_has_nothing_yet_may_become_another(tmp_path):
    """Its options were wrong, or its recordings: it ended before there was anything to keep."""
    RunFolder.open_or_create(tmp_path, CONFIG)
    with pytest.raises(UserError, match="--epochs was"):  # another one may be at work on another fold
        RunFolder.open_or_create(tmp_path, CONFIG | {"epochs": 1}, only=(0, 0))
    RunFolder.open_or_create(tmp_path, CONFIG | {"epochs": 1})
    assert RunFolder.open(tmp_path).config["epochs"] == 1
    (tmp_path / "model.npz").write_bytes(b"a model")
    with pytest.raises(UserError, match="--epochs was 1"):
        RunFolder.open_or_create(tmp_path, CONFIG)


def test_a_run_may_get_more_repeats_and_not_lose_any(tmp_path):
    may_change = (*MAY_CHANGE, "repeats")
    RunFolder.open_or_create(tmp_path, CONFIG | {"repeats": 1}, may_change).save_fold(make_fold(0, 1))
    longer = RunFolder.open_or_create(tmp_path, CONFIG | {"repeats": 3}, may_change, only=(1, 0))
    assert longer.finished() == [(0, 1)]
    longer.save_fold(make_fold(1, 0))
    one = RunFolder.open_or_create(tmp_path, CONFIG | {"repeats": 1}, may_change, only=(0, 0))
    assert one.config["repeats"] == 3  # which others may be computing
    del longer, one  # and their locks
    assert RunFolder.open_or_create(tmp_path, CONFIG | {"repeats": 2}, may_change).config["repeats"] == 2
    with pytest.raises(UserError, match="has folds of 2 repeats: use another --out, or --repeats 2 at least"):
        RunFolder.open_or_create(tmp_path, CONFIG | {"repeats": 1}, may_change)
    assert RunFolder.open(tmp_path).config["repeats"] == 2


def test_a_folds_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(UserError, match=r"folds: cannot be read \(Permission denied\)"):
        folder.finished()


@pytest.mark.parametrize("damage", ['"loss": 1' + 400 * "0", '"seconds": NaN'])
def test_figures_that_no_training_has_are_damage(tmp_path, damage):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    folder.save_fold(make_fold())
    path = folder.fold_path(0, 0)
    name = damage.split(":")[0]
    path.write_text(re.sub(rf"{name}: [0-9.e-]+", damage, path.read_text()))
    with pytest.raises(UserError, match=r"r0f0\.json: damaged"):
        folder.load_folds()


def test_what_may_change_is_updated(tmp_path):
    RunFolder.open_or_create(tmp_path, CONFIG | {"threads": 2}).checkpoint_path(0, 0).write_bytes(b"state")
    changed = CONFIG | {"threads": 4, "vote": "majority"}
    with pytest.raises(UserError, match="--vote was sum, now majority"):
        RunFolder.open_or_create(tmp_path, changed, {"threads"})
    RunFolder.open_or_create(tmp_path, changed, {"threads", "vote"})
    assert json.loads((tmp_path / "config.json").read_text()) == changed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a JSON object"),
        ('{"labels": "neutral", "vote": "sum"}', "labels is not a list"),
        ('{"labels": ["neutral"], "vote": "best"}', "vote is neither"),
        ('{"labels": ["neutral"], "vote": "sum", "utterances": null}', "utterances is not a number"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for opening in (lambda: RunFolder.open(tmp_path), lambda: RunFolder.open_or_create(tmp_path, CONFIG)):
        with pytest.raises(UserError, match=rf"config\.json: damaged \(.*{said}"):
            opening()


def test_a_configuration_must_name_labels_and_vote(tmp_path):
    with pytest.raises(ValueError, match="vote"):
        RunFolder.open_or_create(tmp_path / "x", CONFIG | {"vote": "best"})
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match=r"x: cannot be written .*--out"):
        RunFolder.open_or_create(tmp_path / "x", CONFIG)


def test_a_folder_that_is_none_of_ours(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path / "missing")
    RunFolder.open_or_create(tmp_path, CONFIG).save_fold(make_fold())
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds results, but no config\.json"):
        RunFolder.open_or_create(tmp_path, CONFIG)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("of something else")
    with pytest.raises(UserError, match=r"holds results, but no config\.json"):
        RunFolder.open_or_create(tmp_path / "mine", CONFIG)


def test_save_fold_brings_everything_up_to_date(tmp_path):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    late, early = make_fold(1, 0), make_fold(0, 1)
    folder.checkpoint_path(1, 0).write_bytes(b"state")
    folder.save_fold(late)
    assert not folder.checkpoint_path(1, 0).exists()
    folder.save_fold(early)
    assert folder.finished() == [(0, 1), (1, 0)]
    assert folder.load_folds() == [early, late]
    assert b"\r" not in (tmp_path / "predictions.csv").read_bytes()
    rows = rows_of(tmp_path / "predictions.csv")
    assert rows[0] == ["repeat", "fold", "file", "speaker", "truth", "prediction", "p_neutral", "p_anger", "p_fear"]
    odd = 'c "loud", late.wav'
    assert [row[:3] for row in rows[1:]] == [
        [repeat, fold, file] for repeat, fold in ("01", "10") for file in ("a.wav", "b.wav", odd)
    ]
    assert rows[3] == ["0", "1", odd, "08", "anger", "fear", "0.333333", "0.166667", "0.5"]
    assert "Folds done: 2 of 4" in (tmp_path / "report.md").read_text()
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "folds", "predictions.csv", "report.md"]
    assert sorted(os.listdir(tmp_path / "folds")) == ["r0f1.json", "r1f0.json"]


def test_tables_follow_the_configured_vote_whatever_the_fold_recorded(tmp_path):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    folder.save_fold(make_fold(0, 0, "sum"))
    folder.save_fold(make_fold(0, 1, "majority"))
    by_sum = [row[5] for row in rows_of(tmp_path / "predictions.csv")[1:]]
    assert by_sum == ["anger", "neutral", "fear"] * 2
    RunFolder.open_or_create(tmp_path, CONFIG | {"vote": "majority"}, {"vote"}).write_tables()
    by_majority = [row[5] for row in rows_of(tmp_path / "predictions.csv")[1:]]
    assert by_majority == ["fear", "neutral", "fear"] * 2


def test_tables_follow_the_newest_configuration(tmp_path):
    """Of two programs that share a folder, the one that was started first may be the last to finish a fold."""
    first = RunFolder.open_or_create(tmp_path, {**CONFIG, "vote": "sum"}, MAY_CHANGE, (0, 0))
    RunFolder.open_or_create(tmp_path, {**CONFIG, "vote": "majority"}, MAY_CHANGE, (0, 1))
    first.save_fold(make_fold())
    assert [row[5] for row in rows_of(tmp_path / "predictions.csv")[1:]] == ["fear", "neutral", "fear"]  # by majority


def test_folds_are_sorted_as_numbers_and_other_files_ignored(tmp_path):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    for fold in (10, 2):
        folder.save_fold(make_fold(0, fold))
    for name in (".r0f3.json.ab12.tmp", "r0f4.checkpoint.npz", "r0f5.json.bak", "r00f6.json", "notes.json"):
        (tmp_path / "folds" / name).write_text("")
    assert folder.finished() == [(0, 2), (0, 10)]


def test_a_damaged_fold_stops_the_resumption_and_names_the_file(tmp_path):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    folder.save_fold(make_fold())
    whole = folder.fold_path(0, 0).read_text()
    folder.fold_path(0, 0).write_text(whole[:200])
    with pytest.raises(UserError, match=r"r0f0\.json: damaged"):
        RunFolder.open_or_create(tmp_path, CONFIG)
    folder.fold_path(0, 0).write_text(whole)
    folder.fold_path(0, 1).write_text(whole)
    with pytest.raises(UserError, match=r"r0f1\.json: damaged \(it holds repeat 0, fold 0\)"):
        RunFolder.open_or_create(tmp_path, CONFIG)
    folder.fold_path(0, 1).unlink()
    assert RunFolder.open_or_create(tmp_path, CONFIG).finished() == [(0, 0)]


def test_labels_of_folds_and_run_must_agree(tmp_path):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    other = RunFolder.open_or_create(tmp_path / "other", CONFIG | {"labels": ["neutral", "fear", "anger"]})
    with pytest.raises(ValueError, match="labels"):
        other.save_fold(make_fold())
    assert other.finished() == []
    folder.save_fold(make_fold())
    other.fold_path(0, 0).write_text(folder.fold_path(0, 0).read_text())
    with pytest.raises(UserError, match=r"labels are not those of config\.json"):
        other.load_folds()


def test_a_full_disk_while_saving_leaves_no_fold_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    folder.checkpoint_path(0, 0).write_bytes(b"state")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"r0f0\.json: No space left"):
        folder.save_fold(make_fold())
    assert folder.finished() == []
    assert os.listdir(tmp_path / "folds") == ["r0f0.checkpoint.npz"]


def test_a_fold_finished_by_another_process_meanwhile_gets_into_the_tables(tmp_path, monkeypatch):
    folder = RunFolder.open_or_create(tmp_path, CONFIG)
    write = write_atomically

    def write_while_another_saves(path, content):
        if path.name == "report.md" and not folder.fold_path(1, 1).exists():
            write(folder.fold_path(1, 1), make_fold(1, 1).to_json())
        write(path, content)

    monkeypatch.setattr(runfolder, "write_atomically", write_while_another_saves)
    folder.save_fold(make_fold(0, 0))
    assert {(row[0], row[1]) for row in rows_of(tmp_path / "predictions.csv")[1:]} == {("0", "0"), ("1", "1")}
    assert "Folds done: 2 of 4" in (tmp_path / "report.md").read_text()


def test_a_tampered_result_cannot_be_built():
    with pytest.raises(ValueError, match="confusion"):
        replace(make_fold(), confusion={"sum": [[3, 0, 0], [0, 0, 0], [0, 0, 0]]})
