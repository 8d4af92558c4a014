"""The report of a run: the paper's table, confusion matrices, and every fold.

    python -m npser.report FOLDER

A report is worked out once, as a list of blocks (paragraphs and tables of strings), and then set as plain text for
the terminal or as Markdown for the run folder's report.md.
"""

import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npser.cli import Parser, run
from npser.errors import UserError
from npser.metrics import (
    Figure,
    ProtocolSummary,
    accuracy,
    average_f1,
    mean_over_classes,
    summarise,
    unweighted_average_recall,
)
from npser.runfolder import FoldResult, RunFolder

# Average F1 in per cent and its "+-" on EMO-DB, 10 folds x 5 repeats (Lim, Jang and Lee 2016).
PAPER_AVERAGE_F1 = {"cnn": (86.06, 2.39), "lstm": (78.31, 4.59), "tdcnn": (86.65, 1.73)}

_WIDTH = 100  # columns of the text report
_VOTE_NAMES = {"sum": "sum of probabilities", "majority": "majority vote"}


@dataclass(frozen=True)
class Table:
    """A table of strings: the first column is set flush left, the others flush right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Block = str | Table  # a paragraph, or a table


def render_text(config: Mapping[str, Any], results: Sequence[FoldResult]) -> str:
    """The report as plain text, at most 100 columns wide with class names of usual length.

    config: the run's configuration (`labels`, `vote`; also shown where there: arch, corpus, cv, folds, repeats, epochs,
    seed); results: the folds done, in any order, none included.
    """
    heading, blocks = _report(config, results)
    parts = [f"{heading}\n{'=' * len(heading)}"]
    for block in blocks:
        if isinstance(block, str):
            parts.append(textwrap.fill(block, _WIDTH, break_on_hyphens=False))
        else:
            parts.append(f"{block.title}\n\n{text_table(block)}")
    return "\n\n".join(parts) + "\n"


def text_table(table: Table) -> str:
    """A table as plain text, without its title."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    lines = [_text_row(table.header, widths), "-" * (sum(widths) + 2 * len(widths) - 2)]
    return "\n".join([*lines, *(_text_row(row, widths) for row in table.rows)])


def render_markdown(config: Mapping[str, Any], results: Sequence[FoldResult]) -> str:
    """The report as Markdown (pipe tables); arguments as in `render_text`."""
    heading, blocks = _report(config, results)
    parts = [f"# {_markdown_escaped(heading)}"]
    for block in blocks:
        if isinstance(block, str):
            parts.append(_markdown_escaped(block))
        else:
            ruler = "| " + " | ".join([":--"] + ["--:"] * (len(block.header) - 1)) + " |"
            rows = [_markdown_row(block.header), ruler, *map(_markdown_row, block.rows)]
            parts.append("\n".join([f"## {_markdown_escaped(block.title)}", "", *rows]))
    return "\n\n".join(parts) + "\n"


def _report(config: Mapping[str, Any], results: Sequence[FoldResult]) -> tuple[str, list[Block]]:
    """The heading and the blocks of a run's report."""
    results = sorted(results, key=lambda result: (result.repeat, result.fold))
    heading = f"{config.get('arch', 'model')} on {config.get('corpus', 'corpus')}"
    blocks: list[Block] = [_protocol(config, len(results))]
    if config.get("corpus") == "demo":
        blocks.append("demo is the built-in, generated corpus: its figures say nothing about real speech.")
    if not results:
        return heading, blocks if config.get("cv") == "none" else [*blocks, "Nothing to report yet."]
    planned_folds = config.get("folds")
    by_vote = {
        vote: summarise(
            {(result.repeat, result.fold): result.matrix(vote) for result in results},
            config["labels"],
            planned_folds if isinstance(planned_folds, int) else None,
        )
        for vote in _VOTE_NAMES
    }
    chosen = by_vote[config["vote"]]
    blocks.append(_headline(chosen))
    if config.get("corpus") == "emodb" and config.get("arch") in PAPER_AVERAGE_F1:
        mean, spread = PAPER_AVERAGE_F1[config["arch"]]
        blocks.append(
            f"The paper's average F1 for {config['arch']}: {mean:.2f} (+-{spread:.2f}), 10 folds x 5 repeats; what its "
            "+- means is not said."
        )
    blocks += [_class_table(chosen), _means_explained(chosen), _figure_table(by_vote)]
    blocks += [_matrix_table(chosen, percent=True), _matrix_table(chosen, percent=False)]
    blocks += [_fold_table(results, config["vote"]), _computing(results)]
    return heading, blocks


def _protocol(config: Mapping[str, Any], done: int) -> str:
    """How the run was made, and how much of it is done."""
    folds, repeats, cv = config.get("folds"), config.get("repeats"), config.get("cv")
    if cv == "none":
        return "Fitted on everything (--cv none): no fold was held out, so there is nothing to test on."
    kind = {
        "stratified": "stratified cross-validation",
        "speaker": "leave-one-speaker-out cross-validation",
        "split": "training and test set as given",
    }
    said = [kind.get(str(cv), "cross-validation")]
    for key, word in (("folds", "folds"), ("repeats", "repeats"), ("epochs", "epochs")):
        if key in config:
            said.append(_count(config[key], word))
    if "seed" in config:
        said.append(f"seed {config['seed']}")
    planned = f" of {folds * repeats}" if isinstance(folds, int) and isinstance(repeats, int) else ""
    return f"{', '.join(said)}; decisions by {_VOTE_NAMES[config['vote']]}. Folds done: {done}{planned}."


def _headline(summary: ProtocolSummary) -> str:
    """The one figure that the paper's abstract gives, with both spreads."""
    figure = summary.average_f1
    spreads = [
        f"+-{_percent(spread)} over {over}"
        for spread, over in ((figure.over_repeats, "repeats"), (figure.over_folds, "folds"))
        if not math.isnan(spread)
    ]
    if summary.folds == 1:
        spreads = ["no spread can be given: only 1 fold"]
    elif math.isnan(figure.over_repeats):
        spreads.append(f"no spread over repeats: {_count(summary.complete_repeats, 'complete repeats')}")
    return f"average F1 {_percent(figure.mean)} ({', '.join(spreads)}); pooled {_percent(figure.pooled)}"


def _class_table(summary: ProtocolSummary) -> Table:
    """The paper's table (precision, recall and F1 of each emotion), the pooled figures beside it."""
    scores = (summary.mean, summary.pooled)
    columns = [column for s in scores for column in (s.precision, s.recall, s.f1)]
    counts = summary.matrix.sum(axis=1)
    rows = [
        (label, *(_percent(column[k]) for column in columns), str(counts[k])) for k, label in enumerate(summary.labels)
    ]
    rows.append(("average", *(_percent(mean_over_classes(column)) for column in columns), str(counts.sum())))
    header = ("emotion", "precision", "recall", "F1", "pooled P", "pooled R", "pooled F1", "decisions")
    return Table("Precision, recall and F1 in per cent", header, tuple(rows))


def _means_explained(summary: ProtocolSummary) -> str:
    text = (
        "Precision, recall and F1 are unweighted means of the figures of single folds, as in the paper; the pooled "
        "ones come from the sum of all confusion matrices. A class never predicted in a fold has precision 0 there."
    )
    if summary.absences:
        absences = _count(summary.absences, "times")
        text += f" A class without utterances in a fold is left out of that fold's means ({absences}); - is undefined."
    return text


def _figure_table(by_vote: Mapping[str, ProtocolSummary]) -> Table:
    """Average F1, UAR and accuracy by both votes, with their spreads."""
    rows = []
    for vote, summary in by_vote.items():
        figures: tuple[tuple[str, Figure], ...] = (
            ("average F1", summary.average_f1),
            ("UAR", summary.uar),
            ("accuracy", summary.accuracy),
        )
        for name, figure in figures:
            values = (figure.mean, figure.over_repeats, figure.over_folds, figure.pooled)
            rows.append((f"{name}, {_VOTE_NAMES[vote]}", *map(_percent, values)))
    header = ("figure", "mean of folds", "+- repeats", "+- folds", "pooled")
    return Table("Both votes, in per cent; +- is the standard deviation (n - 1)", header, tuple(rows))


def _matrix_table(summary: ProtocolSummary, percent: bool) -> Table:
    """The pooled confusion matrix: each row in per cent of the true class, or the counts."""
    rows = []
    for label, row in zip(summary.labels, summary.matrix, strict=True):
        total = int(row.sum())
        cells = [f"{100 * count / total:.1f}" if total else "-" for count in row] if percent else map(str, row)
        rows.append((label, *cells))
    unit = "per cent of each true class" if percent else "decisions"
    header = ("true \\ predicted", *(label if len(label) <= 9 else label[:8] + "." for label in summary.labels))
    return Table(f"Confusion matrix, {unit}", header, tuple(rows))


def _fold_table(results: Iterable[FoldResult], vote: str) -> Table:
    """Every fold on a line: nothing is left out of the means above."""
    rows = []
    for result in results:
        matrix = result.matrix(vote)
        figures = (average_f1(matrix), unweighted_average_recall(matrix), accuracy(matrix))
        last = result.epochs[-1] if result.epochs else None
        training = (f"{last.loss:.4f}", _percent(last.accuracy)) if last else ("-", "-")
        rows.append((f"{result.repeat}.{result.fold}", str(matrix.sum()), *map(_percent, figures), *training))
    header = ("fold", "utterances", "average F1", "UAR", "accuracy", "training loss", "training accuracy")
    return Table("Every fold (repeat.fold); training figures of the last epoch", header, tuple(rows))


def _computing(results: Sequence[FoldResult]) -> str:
    """On which backends the folds ran, and for how long."""
    backends = Counter(str(result.run["backend"]) for result in results if "backend" in result.run)
    where = ", ".join(f"{backend} {_count(folds, 'folds')}" for backend, folds in sorted(backends.items()))
    seconds = sum(epoch.seconds for result in results for epoch in result.epochs)
    return f"Training took {seconds:.0f} s in all{f'; backend: {where}' if where else ''}."


def _percent(fraction: float | np.float64) -> str:
    """A fraction in per cent with two decimals, as the paper prints it; "-" where undefined."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"


def _count(number: Any, plural: str) -> str:
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"


def _text_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown_escaped, cells)) + " |"


def _markdown_escaped(text: str) -> str:
    """Keep class and folder names from being read as markup."""
    return "".join("\\" + character if character in "\\|_*`<[#" else character for character in text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m npser.report`; returns the exit status."""
    parser = Parser(
        prog="python -m npser.report",
        description="Print the report of a run: precision, recall and F1 of each emotion as in the paper's table "
        "(means of the per-fold figures) with the pooled figures beside them, average F1 with its spread over repeats "
        "and over folds, UAR and accuracy by both votes, confusion matrices, and every fold. Unfinished runs are "
        "reported as far as they are done.",
        epilog="The same report lies in the run folder as report.md. Exit status: 0 ok, 2 a folder cannot be reported.",
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="a run folder, --out of npser.train")
    folders: list[Path] = parser.parse_args(arguments).folders
    status, separator = 0, ""
    for path in folders:
        try:
            folder = RunFolder.open(path)
            text = render_text(folder.config, folder.load_folds())
        except UserError as error:
            print(f"npser.report: {error}", file=sys.stderr)
            status = 2
            continue
        print(f"{separator}{text}", end="")
        separator = "\n"
    return status


if __name__ == "__main__":
    run("npser.report", main)
