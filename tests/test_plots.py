"""Figures and the page that holds them; several runs side by side; folders of one run put together."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from test_report import CONFIG, EMOTIONS, four_folds, make_fold

from npser import runreport
from npser.errors import UserError
from npser.report import main
from npser.runfolder import RunFolder


def run_folder(path, results, /, **changes):
    folder = RunFolder.open_or_create(path, CONFIG | changes)
    for result in results:
        folder.save_fold(result)
    return path


def test_several_runs_are_set_side_by_side(tmp_path, capsys):
    def apart(results):
        """With other utterances in fold 1 than in fold 0."""
        return [
            replace(r, utterances=tuple(replace(u, file=f"{r.fold}-{u.file}") for u in r.utterances)) for r in results
        ]

    one = run_folder(tmp_path / "one" / "run", apart(four_folds()))
    others = [make_fold(0, 0, [1, 0, 1, 1]), make_fold(0, 1, [1, 1, 1, 1])]
    two = run_folder(tmp_path / "two" / "run", apart(others), seed=1)
    assert main([str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 runs side by side")
    assert re.search(r"^one/run  tdcnn on emodb +4 ", out, re.MULTILINE)
    # right in repeat 0, which both have: one (1, 1, 1, 1) and (1, 0, 1, 1), two (0, 1, 1, 1) and (0, 0, 1, 1)
    row = re.search(r"^one/run - two/run +8 +(\S+) +- +- +2 : 0 +0\.500", out, re.MULTILINE)
    assert row, out
    assert float(row[1]) == 100 * (2 / 4 + 0) / 2


def test_parts_of_a_run_are_put_together(tmp_path, capsys):
    folds = four_folds()
    whole = run_folder(tmp_path / "whole", folds)
    first = run_folder(tmp_path / "a", folds[:2], threads=2)
    second = run_folder(tmp_path / "b", folds[1:], threads=8)
    main([str(whole)])
    expected = capsys.readouterr().out
    assert main([str(first), str(second)]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert captured.err == "npser.report: 2 folders of 1 run: those with the same settings are put together\n"


def test_a_run_without_folds_cannot_be_compared(tmp_path):
    one, two = run_folder(tmp_path / "a", four_folds()), run_folder(tmp_path / "b", [], seed=3)
    with pytest.raises(UserError, match="no fold is finished"):
        main([str(one), str(two)])
    with pytest.raises(UserError, match="add --plots"):
        main([str(one), "--out", str(tmp_path)])


def test_listeners_stand_beside_the_confused(tmp_path, capsys):
    truth = (0, 0, 1, 1)
    file = tmp_path / "erkennung.txt"
    file.write_text("Nr.\tSatz\terkannt\tnat.\n1\t0.wav\t65,00\t1,00\n2\t3.wav\t95,00\t1,00\n", encoding="latin-1")
    run = run_folder(tmp_path / "run", [make_fold(r, 0, [1, 0, 1, 1], truth) for r in (0, 1)])
    main([str(run), "--listeners", str(file)])
    out = capsys.readouterr().out
    assert re.search(r"^0\.wav +neutral +anger +2 of 2 +10\.0 +65$", out, re.MULTILINE)
    assert "On the 1 utterance that the network always confused their mean is 65.0" in " ".join(out.split())
    other = run_folder(tmp_path / "other", [make_fold(0, 0, [1, 0, 1, 1], truth)], corpus="emodb-to-ravdess")
    main([str(other), "--listeners", str(file)])
    assert "listeners" in capsys.readouterr().out
    with pytest.raises(UserError, match="leave it away"):
        main([str(run), str(other), "--listeners", str(file)])


def test_matplotlib_is_asked_for_in_one_line_before_anything_is_printed(tmp_path, monkeypatch, capsys):
    run = run_folder(tmp_path / "run", four_folds())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'npser\[plot\]'"):
        main([str(run), "--plots"])
    with pytest.raises(UserError, match="nothing to draw"):
        main([str(run_folder(tmp_path / "empty", [])), "--plots"])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.rglob("plots"))


class Page(HTMLParser):
    """Collects what a page refers to, and checks that its elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.identifiers, self.references, self.counts = [], [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attributes:
            if name == "id":
                self.identifiers.append(value)
            if name in ("href", "xlink:href", "src"):
                self.references.append(value)
            self.references += re.findall(r"url\((.*?)\)", value or "")
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked_page(path, figures):
    page = Page()
    page.feed(path.read_text())
    assert page.open == []
    assert page.counts["svg"] == page.counts["figcaption"] == figures
    assert "metadata" not in page.counts  # of matplotlib, with addresses in it
    assert path.read_text().count('role="img" aria-label="') == figures
    assert len(set(page.identifiers)) == len(page.identifiers)
    inside = [r for r in page.references if not r.startswith("data:")]
    assert inside
    assert all(r.startswith("#") and r[1:] in page.identifiers for r in inside)  # nothing from elsewhere
    return page


@pytest.fixture
def drawing():
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: pip install 'npser[plot]'")


@pytest.mark.usefixtures("drawing")
def test_plots_of_a_run(tmp_path):
    labels = EMOTIONS
    folds = []
    for n, speaker in enumerate(["03", "08", "09"]):
        result = make_fold(0, n, [0, 1, 2, 3, 4, 5, (6 + n) % 7], range(7), labels)
        utterances = [vars(u) | {"speaker": speaker, "file": f"{speaker}{u.file}"} for u in result.utterances]
        folds.append(vars(result) | {"utterances": tuple(type(result.utterances[0])(**u) for u in utterances)})
    results = [type(result)(**f) for f in folds]
    run = run_folder(tmp_path / "run", results, labels=labels, folds=3, repeats=1)
    assert main([str(run), "--plots"]) == 0
    names = {f"{n}.{form}" for n in ("confusion", "classes", "speakers", "curves") for form in ("png", "svg")}
    assert {path.name for path in (run / "plots").iterdir()} == names | {"report.html"}
    for name in names:
        head = (run / "plots" / name).read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n" if name.endswith("png") else head.startswith(b"<?xml")
    page = checked_page(run / "plots" / "report.html", 4)
    assert page.counts["table"] > 5
    first = (run / "plots" / "confusion.svg").read_bytes()
    main([str(run), "--plots"])
    assert (run / "plots" / "confusion.svg").read_bytes() == first  # drawn again, the same


@pytest.mark.usefixtures("drawing")
def test_plots_of_several_runs(tmp_path):
    one = run_folder(tmp_path / "<a>", four_folds())
    two = run_folder(tmp_path / "b", four_folds()[:1], seed=1)
    assert main([str(one), str(two), "--plots", "--out", str(tmp_path / "out")]) == 0
    checked_page(tmp_path / "out" / "report.html", 2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        main([str(one), "--plots", "--out", str(tmp_path / "file" / "x")])


def test_markdown_output(tmp_path, capsys):
    run = run_folder(tmp_path / "run", four_folds())
    main([str(run), "--markdown"])
    assert capsys.readouterr().out == (run / "report.md").read_text()
    assert runreport.percent(0.5) == "50.00"


def test_letters_that_the_font_lacks_are_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: pip install 'npser[plot]'")
    folds = [make_fold(0, f, [0, 1, 1, 1], labels=("怒り", "anger")) for f in (0, 1)]
    path = run_folder(tmp_path / "run", folds, labels=["怒り", "anger"])
    assert main([str(path), "--plots"]) == 0
    complaint, _ = capsys.readouterr().err.splitlines()
    assert complaint == "--plots: boxes stand for letters that the font of the figures lacks"


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: pip install 'npser[plot]'")
    labels = ("$a^$", "anger")
    folds = [make_fold(0, f, [0, 1, 1, 1], labels=labels) for f in (0, 1)]
    path = run_folder(tmp_path / "run", folds, labels=list(labels))
    assert main([str(path), "--plots"]) == 0
    assert (path / "plots" / "confusion.png").stat().st_size
