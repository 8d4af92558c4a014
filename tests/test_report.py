"""The expected figures were worked out by hand; see the confusion matrices in `FOLDS`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from npser.foldresult import EpochResult, fold_result
from npser.report import main
from npser.runfolder import RunFolder
from npser.runreport import render_markdown, render_text

EMOTIONS = ["neutral", "anger", "fear", "disgust", "sadness", "boredom", "happy"]
CONFIG = {
    "arch": "tdcnn",
    "corpus": "emodb",
    "labels": ["neutral", "anger"],
    "folds": 2,
    "repeats": 2,
    "epochs": 3,
    "cv": "stratified",
    "vote": "sum",
    "seed": 0,
}
# (repeat, fold): predictions; the truth is [0, 0, 1, 1], so the confusion matrices are
# [[2, 0], [0, 2]], [[1, 1], [0, 2]], [[0, 2], [0, 2]], [[2, 0], [0, 2]]
FOLDS = {(0, 0): [0, 0, 1, 1], (0, 1): [0, 1, 1, 1], (1, 0): [1, 1, 1, 1], (1, 1): [0, 0, 1, 1]}


def make_fold(repeat, fold, predicted, truth=(0, 0, 1, 1), labels=("neutral", "anger"), majority=None):
    return fold_result(
        repeat=repeat,
        fold=fold,
        labels=labels,
        vote="sum",
        epochs=[EpochResult(1, 1.0, 0.5, 2.0), EpochResult(2, 0.125, 0.975, 3.0)],
        files=[f"{i}.wav" for i in range(len(truth))],
        speakers=["03"] * len(truth),
        truth=truth,
        probabilities=[[0.9 if k == p else 0.1 for k in range(len(labels))] for p in predicted],
        majority=truth if majority is None else majority,  # the majority is right unless told otherwise
        run={"backend": "cuda" if fold else "cpu"},
    )


def four_folds():
    return [make_fold(*key, predicted) for key, predicted in FOLDS.items()]


def row(text, name):
    """The numbers of the first row that starts with `name`, in the text or the Markdown form."""
    found = re.search(rf"^(?:\| )?{re.escape(name)}(?: \||  )(.*)$", text, re.MULTILINE)
    assert found, f"no row {name!r} in:\n{text}"
    return found[1].replace("|", " ").split()


@pytest.mark.parametrize("render", [render_text, render_markdown])
def test_the_table(render):
    text = render(CONFIG, four_folds())
    # mean P, R, F1 of the folds; pooled from [[5, 3], [0, 8]]: 1, 5/8, 10/13 and 8/11, 1, 16/19; decisions
    assert row(text, "neutral") == ["75.00", "62.50", "66.67", "100.00", "62.50", "76.92", "8"]
    assert row(text, "anger") == ["79.17", "100.00", "86.67", "72.73", "100.00", "84.21", "8"]
    assert row(text, "average") == ["77.08", "81.25", "76.67", "86.36", "81.25", "80.57", "16"]
    # one repeat at 13/15, the other at 2/3: 20 / sqrt(2); folds at 1, 11/15, 1/3, 1: sqrt(268/2700)
    assert "average F1 76.67 (+-14.14 over repeats, +-31.51 over folds); pooled 80.57" in text
    assert "Folds done: 4 of 4" in text
    assert "2 folds, 2 repeats, 3 epochs, seed 0; decisions by sum of probabilities" in " ".join(text.split())


@pytest.mark.parametrize("render", [render_text, render_markdown])
def test_both_votes(render):
    text = render(CONFIG, four_folds())
    # accuracies 1, 3/4 | 1/2, 1: repeats 7/8 and 3/4 differ by 12.5 / sqrt(2); folds sqrt(44/768)
    assert row(text, "accuracy, sum of probabilities") == ["81.25", "8.84", "23.94", "81.25"]
    assert row(text, "UAR, sum of probabilities") == ["81.25", "8.84", "23.94", "81.25"]
    assert row(text, "average F1, sum of probabilities") == ["76.67", "14.14", "31.51", "80.57"]
    assert row(text, "accuracy, majority vote") == ["100.00", "0.00", "0.00", "100.00"]
    by_majority = render(CONFIG | {"vote": "majority"}, four_folds())
    assert "decisions by majority vote" in by_majority
    assert row(by_majority, "neutral") == ["100.00"] * 6 + ["8"]


def test_confusion_matrices():
    per_cent, counts = render_text(CONFIG, four_folds()).split("Confusion matrix, ")[1:]
    assert per_cent.startswith("per cent of each true class")
    assert row(per_cent, "neutral") == ["62.5", "37.5"]
    assert row(per_cent, "anger") == ["0.0", "100.0"]
    assert counts.startswith("decisions")
    assert row(counts, "neutral") == ["5", "3"]
    assert row(counts, "anger") == ["0", "8"]


def test_every_fold_is_shown():
    text = render_text(CONFIG, list(reversed(four_folds())))
    fold_rows = text.split("Every fold")[1]
    assert re.findall(r"^\d\.\d", fold_rows, re.MULTILINE) == ["0.0", "0.1", "1.0", "1.1"]
    # F1 (2/3 + 4/5)/2, UAR 3/4, accuracy 3/4, loss and accuracy of the last epoch
    assert row(fold_rows, "0.1") == ["4", "73.33", "75.00", "75.00", "0.1250", "97.50"]
    assert "Training took 20 s in all; backend: cpu 2 folds, cuda 2 folds." in text


def test_repeats_are_averaged():
    decided = ([0, 0, 1, 1], [0, 1, 1, 1])  # the second is wrong once, with as much confidence: the first class wins
    text = render_text(CONFIG | {"folds": 1}, [make_fold(r, 0, predicted) for r, predicted in enumerate(decided)])
    joined = " ".join(text.split())
    assert "the mean probabilities of the 2 networks that were not trained on it" in joined
    assert "whole repeat: average F1 100.00, pooled UAR 100.00, accuracy 100.00." in joined
    two = [make_fold(r, 0, predicted) for r, predicted in enumerate(decided)]
    by_majority = " ".join(render_text(CONFIG | {"folds": 1, "vote": "majority"}, two).split())
    assert "decided by the majority of the 2 networks" in by_majority
    assert "Repeats averaged" not in render_text(CONFIG, four_folds()[:2])
    leaky = CONFIG | {"folds": 1, "experiment": "oversampled-first"}  # whose networks may have trained on it
    assert "Repeats averaged" not in render_text(leaky, two)


def test_no_spread_is_invented():
    one_fold = render_text(CONFIG, four_folds()[1:2])
    assert "average F1 73.33 (no spread can be given: only 1 fold); pooled 73.33" in one_fold
    assert "Folds done: 1 of 4" in one_fold
    assert row(one_fold, "accuracy, sum of probabilities") == ["75.00", "-", "-", "75.00"]
    one_repeat = render_text(CONFIG, four_folds()[:2])
    # 1 and 11/15 differ by 4/15: 26.67 / sqrt(2)
    assert "average F1 86.67 (+-18.86 over folds, no spread over repeats: 1 complete repeat); pooled" in one_repeat
    half_repeats = render_text(CONFIG, four_folds()[1:3])
    assert "no spread over repeats: 0 complete repeats" in half_repeats


@pytest.mark.parametrize(
    ("arch", "reported"), [("cnn", "86.06 (+-2.39)"), ("lstm", "78.31 (+-4.59)"), ("tdcnn", "86.65 (+-1.73)")]
)
def test_the_papers_figure_stands_beside_ours_on_its_own_corpus_only(arch, reported):
    config = CONFIG | {"arch": arch}
    assert f"The paper's average F1 for {arch}: {reported}" in render_text(config, four_folds())
    assert "The paper's average F1" not in render_text(config | {"corpus": "demo"}, four_folds())


def test_the_demonstration_is_called_one():
    assert "nothing about real speech" in render_text(CONFIG | {"corpus": "demo"}, four_folds())
    assert "nothing about real speech" not in render_text(CONFIG, four_folds())


def test_seven_emotions_fit_into_100_columns_in_the_papers_order():
    truth = list(range(7)) * 10
    config = CONFIG | {"labels": EMOTIONS, "folds": 10, "repeats": 5}
    results = [make_fold(r, f, truth, truth, EMOTIONS) for r in range(5) for f in range(10)]
    text = render_text(config, results)
    assert max(map(len, text.splitlines())) <= 100
    assert re.findall(r"^(\w+)(?: +100\.00){6} +500$", text, re.MULTILINE) == EMOTIONS
    header = re.findall(r"^true \\ predicted +(.*)$", text, re.MULTILINE)
    assert [line.split() for line in header] == [EMOTIONS, EMOTIONS]


def test_classes_absent_from_a_fold():
    config = CONFIG | {"cv": "speaker", "repeats": 1}
    text = render_text(config, [make_fold(0, 0, [0, 1], truth=[0, 0])])
    assert "leave-one-speaker-out" in text
    assert row(text, "anger") == ["-", "-", "-", "-", "-", "-", "0"]
    assert row(text, "average") == ["100.00", "50.00", "66.67", "100.00", "50.00", "66.67", "2"]
    assert "left out of that fold's means (1 time)" in " ".join(text.split())
    assert "left out of" not in render_text(CONFIG, four_folds())


def test_nothing_to_report():
    assert "Folds done: 0 of 4." in render_text(CONFIG, [])
    assert "Nothing to report yet." in render_text(CONFIG, [])
    assert "no fold was held out" in render_markdown(CONFIG | {"cv": "none"}, [])


def test_a_bare_configuration_is_enough():
    text = render_text({"labels": ["neutral", "anger"], "vote": "sum"}, four_folds())
    assert "Folds done: 4." in text
    assert row(text, "average")[2] == "76.67"


def test_markdown_tables_are_well_formed_whatever_a_class_is_called():
    labels = ("a|b_c", "<i>*x*")
    text = render_markdown(CONFIG | {"labels": list(labels)}, [make_fold(0, 0, [0, 0, 1, 1], labels=labels)])
    assert text.startswith("# tdcnn on emodb\n")
    assert "| a\\|b\\_c |" in text
    assert "\\<i>\\*x\\* |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1
        assert re.match(r"\| :-- (\| --: )+\|$", block.splitlines()[1])


def test_long_class_names_are_cut_in_the_matrix_header_only():
    text = render_text(CONFIG | {"labels": ["neutral", "astonishment"]}, [])
    assert "astonishment" not in text  # no folds, no table
    result = make_fold(0, 0, [0, 0, 1, 1], labels=("neutral", "astonishment"))
    text = render_text(CONFIG | {"labels": ["neutral", "astonishment"]}, [result])
    assert re.search(r"^true \\ predicted +neutral +astonish\.$", text, re.MULTILINE)
    assert row(text, "astonishment") == ["100.00"] * 6 + ["2"]


@pytest.fixture
def folder(tmp_path):
    opened = RunFolder.open_or_create(tmp_path / "run", CONFIG)
    for result in four_folds():
        opened.save_fold(result)
    return opened


def test_command_prints_the_text_report(folder, capsys):
    assert main([str(folder.path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == render_text(CONFIG, four_folds())
    assert captured.err == ""
    assert (folder.path / "report.md").read_text() == render_markdown(CONFIG, four_folds())


def test_command_reports_the_other_folders_when_one_is_bad(folder, tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(folder.path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == render_text(CONFIG, four_folds())
    assert captured.err.startswith(f"npser.report: {tmp_path / 'none'}: not a run folder")
    assert captured.err.count("\n") == 1


def test_command_names_a_damaged_fold(folder, capsys):
    folder.fold_path(1, 0).write_text("{}")
    assert main([str(folder.path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "r1f0.json: damaged ('labels' is missing)" in captured.err


def test_command_as_a_module(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "npser.report", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])

    good = run(str(folder.path))
    assert (good.returncode, good.stdout, good.stderr) == (0, render_text(CONFIG, four_folds()), "")
    assert run(str(tmp_path / "none")).returncode == 2
    assert run().returncode == 2
    help_text = run("--help")
    assert help_text.returncode == 0
    assert "Exit status" in help_text.stdout
