"""The report of a run as a document: the paper's table, confusion matrices, intervals, hard utterances, every fold.

A report is worked out once, as a `Document`, and then set as plain text for the terminal, as Markdown for the run
folder's report.md, or as a page with figures. `npser.report` is the command that prints it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from npser.analysis import (
    RESAMPLES,
    Hard,
    Interval,
    averaged,
    learning_curves,
    speaker_matrices,
    uar_interval,
    utterance_record,
)
from npser.cli import count
from npser.document import Block, Document, Table
from npser.foldresult import FoldResult
from npser.metrics import (
    Figure,
    ProtocolSummary,
    accuracy,
    average_f1,
    mean_over_classes,
    summarise,
    unweighted_average_recall,
)

# Average F1 in per cent and its "+-" on EMO-DB, 10 folds x 5 repeats (Lim, Jang and Lee 2016).
PAPER_AVERAGE_F1 = {"cnn": (86.06, 2.39), "lstm": (78.31, 4.59), "tdcnn": (86.65, 1.73)}

HARDEST = 15  # utterances in the table of those most often confused
_VOTE_NAMES = {"sum": "sum of probabilities", "majority": "majority vote"}


def render_text(config: Mapping[str, Any], results: Sequence[FoldResult]) -> str:
    """The report as plain text; arguments as in `report`."""
    return report(config, results).text()


def render_markdown(config: Mapping[str, Any], results: Sequence[FoldResult]) -> str:
    """The report as Markdown; arguments as in `report`."""
    return report(config, results).markdown()


def report(
    config: Mapping[str, Any], results: Sequence[FoldResult], heard: Mapping[str, float] | None = None
) -> Document:
    """The report of a run.

    config: the run's configuration (`labels`, `vote`; also shown where there: arch, corpus, cv, folds, repeats, epochs,
    seed); results: the folds done, in any order, none included; heard: file name -> share of human listeners who
    recognised the recording, where that is known.
    """
    heading, blocks = _report(config, results, heard or {})
    return Document(heading, tuple(blocks))


def _report(
    config: Mapping[str, Any], results: Sequence[FoldResult], heard: Mapping[str, float]
) -> tuple[str, list[Block]]:
    """The heading and the blocks of a run's report."""
    results = sorted(results, key=lambda result: (result.repeat, result.fold))
    heading = what(config)
    blocks: list[Block] = [_protocol(config, len(results))]
    if config.get("corpus") == "demo":
        blocks.append("demo is the built-in, generated corpus: its figures say nothing about real speech.")
    if not results:
        return heading, blocks if config.get("cv") == "none" else [*blocks, "Nothing to report yet."]
    by_vote = {vote: summary_of(config, results, vote) for vote in _VOTE_NAMES}
    chosen = by_vote[config["vote"]]
    blocks.append(_headline(chosen))
    if paper := paper_figure(config):
        mean, spread = paper
        blocks.append(
            f"The paper's average F1 for {config['arch']}: {mean:.2f} (+-{spread:.2f}), 10 folds x 5 repeats; what its "
            "+- means is not said."
        )
    blocks += [class_table(chosen), _means_explained(chosen), _figure_table(by_vote)]
    blocks += [*_interval(results, config["vote"]), *_averaged(config, results)]
    blocks += [_matrix_table(chosen, percent=True), _matrix_table(chosen, percent=False)]
    blocks += _hardest(utterance_record(results, config["vote"]), heard)
    blocks += [*_curves(results), _fold_table(results, config["vote"]), _computing(results)]
    return heading, blocks


def what(config: Mapping[str, Any]) -> str:
    """What a run is: the network, its corpus, and the experiment if it is none of npser.train's."""
    experiment = f", experiment {config['experiment']}" if config.get("experiment") else ""
    return f"{config.get('arch', 'model')} on {config.get('corpus', 'corpus')}{experiment}"


def paper_figure(config: Mapping[str, Any]) -> tuple[float, float] | None:
    """The paper's average F1 and its "+-" where a run is its experiment: stratified folds of EMO-DB."""
    same = config.get("corpus") == "emodb" and config.get("cv") == "stratified" and not config.get("experiment")
    return PAPER_AVERAGE_F1.get(str(config.get("arch"))) if same else None


def summary_of(config: Mapping[str, Any], results: Sequence[FoldResult], vote: str | None = None) -> ProtocolSummary:
    """The figures of a run, by its own vote unless another is named."""
    matrices = {(result.repeat, result.fold): result.matrix(vote or config["vote"]) for result in results}
    return summarise(matrices, config["labels"], config.get("folds"))


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
    if config.get("experiment"):
        said.insert(0, f"experiment {config['experiment']} (python -m bench.leakage or bench.nested)")
    if "recipe" in config:
        said.append(f"recipe {config['recipe']}")
    for key, word in (("folds", "folds"), ("repeats", "repeats"), ("epochs", "epochs")):
        if key in config:
            said.append(count(config[key], word))
    if "seed" in config:
        said.append(f"seed {config['seed']}")
    planned = f" of {folds * repeats}" if isinstance(folds, int) and isinstance(repeats, int) else ""
    return f"{', '.join(said)}; decisions by {_VOTE_NAMES[config['vote']]}. Folds done: {done}{planned}."


def _headline(summary: ProtocolSummary) -> str:
    """The one figure that the paper's abstract gives, with both spreads."""
    figure = summary.average_f1
    spreads = [
        f"+-{percent(spread)} over {over}"
        for spread, over in ((figure.over_repeats, "repeats"), (figure.over_folds, "folds"))
        if not math.isnan(spread)
    ]
    if summary.folds == 1:
        spreads = ["no spread can be given: only 1 fold"]
    elif math.isnan(figure.over_repeats):
        spreads.append(f"no spread over repeats: {count(summary.complete_repeats, 'complete repeats')}")
    return f"average F1 {percent(figure.mean)} ({', '.join(spreads)}); pooled {percent(figure.pooled)}"


def class_table(summary: ProtocolSummary) -> Table:
    """The paper's table (precision, recall and F1 of each emotion), the pooled figures beside it."""
    scores = (summary.mean, summary.pooled)
    columns = [column for s in scores for column in (s.precision, s.recall, s.f1)]
    counts = summary.matrix.sum(axis=1)
    rows = [
        (label, *(percent(column[k]) for column in columns), str(counts[k])) for k, label in enumerate(summary.labels)
    ]
    rows.append(("average", *(percent(mean_over_classes(column)) for column in columns), str(counts.sum())))
    header = ("emotion", "precision", "recall", "F1", "pooled P", "pooled R", "pooled F1", "decisions")
    return Table("Precision, recall and F1 in per cent", header, tuple(rows))


def _means_explained(summary: ProtocolSummary) -> str:
    text = (
        "Precision, recall and F1 are unweighted means of the figures of single folds, as in the paper; the pooled "
        "ones come from the sum of all confusion matrices. A class never predicted in a fold has precision 0 there."
    )
    if summary.absences:
        absences = count(summary.absences, "times")
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
            rows.append((f"{name}, {_VOTE_NAMES[vote]}", *map(percent, values)))
    header = ("figure", "mean of folds", "+- repeats", "+- folds", "pooled")
    return Table("Both votes, in per cent; +- is the standard deviation (n - 1)", header, tuple(rows))


def _matrix_table(summary: ProtocolSummary, percent: bool) -> Table:
    """The pooled confusion matrix: each row in per cent of the true class, or the counts."""
    rows = []
    for label, row in zip(summary.labels, summary.matrix, strict=True):
        total = int(row.sum())
        cells = [f"{100 * n / total:.1f}" if total else "-" for n in row] if percent else map(str, row)
        rows.append((label, *cells))
    unit = "per cent of each true class" if percent else "decisions"
    header = ("true \\ predicted", *(label if len(label) <= 9 else label[:8] + "." for label in summary.labels))
    return Table(f"Confusion matrix, {unit}", header, tuple(rows))


def _interval(results: Sequence[FoldResult], vote: str) -> list[Block]:
    """The interval of the UAR, and what each speaker contributes to it."""
    matrices = speaker_matrices(results, vote)
    interval = uar_interval(matrices)
    if interval is None:
        why = "the speakers are unknown" if "" in matrices else "there is only one speaker"
        return [f"No confidence interval over speakers: {why}."]
    text = (
        f"Pooled UAR {percent(interval.value)}, 95 % confidence interval {ends(interval)} (bootstrap over the "
        f"{interval.speakers} speakers, {RESAMPLES} resamples)."
    )
    rows = [
        (speaker, str(matrix.sum()), percent(unweighted_average_recall(matrix)), percent(accuracy(matrix)))
        for speaker, matrix in matrices.items()
    ]
    return [text, Table("Each speaker, in per cent", ("speaker", "decisions", "UAR", "accuracy"), tuple(rows))]


def _averaged(config: Mapping[str, Any], results: Sequence[FoldResult]) -> list[Block]:
    """What the networks of all repeats say together; nothing of an experiment, which may have trained on them."""
    if config.get("experiment") or (together := averaged(results, config.get("folds"))) is None:
        return []
    decided, networks = together
    summary = summary_of(config, decided)
    interval = uar_interval(speaker_matrices(decided, config["vote"]))
    between = f" ({ends(interval)})" if interval else ""
    by = "the mean probabilities" if config["vote"] == "sum" else "the majority"
    return [
        f"Repeats averaged: each utterance decided by {by} of the {networks} networks that were not trained on it, one "
        f"of each whole repeat: average F1 {percent(summary.average_f1.mean)}, pooled UAR {percent(summary.uar.pooled)}"
        f"{between}, accuracy {percent(summary.accuracy.pooled)}."
    ]


def _hardest(record: Sequence[Hard], heard: Mapping[str, float]) -> list[Block]:
    """The utterances most often confused, beside what human listeners made of them."""
    confused = [hard for hard in record if hard.wrong]
    if not confused:
        return ["No utterance was ever confused."]

    def rate(hard: Hard) -> float | None:
        return heard.get(hard.file.rsplit("/", 1)[-1])

    any_heard = any(rate(hard) is not None for hard in confused)

    def cells(hard: Hard) -> tuple[str, ...]:
        human = (_whole_percent(rate(hard)),) if any_heard else ()
        wrong = f"{hard.wrong} of {hard.tested}"
        return (hard.file, hard.truth, hard.taken_for, wrong, f"{100 * hard.probability:.1f}", *human)

    header = ("utterance", "truth", "taken for", "wrong", "p of truth", *(("listeners",) if any_heard else ()))
    shown = confused[:HARDEST]
    title = f"Most often confused ({len(shown)} of {len(confused)} ever confused); probabilities in per cent"
    blocks: list[Block] = [Table(title, header, tuple(map(cells, shown)), left=3)]
    always = [r for hard in record if hard.wrong == hard.tested and (r := rate(hard)) is not None]
    never = [r for hard in record if not hard.wrong and (r := rate(hard)) is not None]
    if always and never:
        blocks.append(
            "Listeners: the share of human listeners who named the emotion that was acted. On the "
            f"{count(len(always), 'utterances')} that the network always confused their mean is "
            f"{100 * sum(always) / len(always):.1f}, on the {len(never)} that it never confused "
            f"{100 * sum(never) / len(never):.1f}."
        )
    return blocks


def _whole_percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.0f}"


def _curves(results: Sequence[FoldResult]) -> list[Block]:
    """How the training went: loss and accuracy by epoch."""
    rows = []
    for epoch, losses, accuracies in learning_curves(results):
        figures = (losses.mean(), losses.min(), losses.max())
        rows.append((str(epoch), str(len(losses)), *(f"{x:.4f}" for x in figures), percent(accuracies.mean())))
    header = ("epoch", "folds", "loss", "least", "largest", "training accuracy")
    title = "Learning curves: training loss and accuracy, mean over the folds"
    return [Table(title, header, tuple(rows))] if rows else []


def _fold_table(results: Iterable[FoldResult], vote: str) -> Table:
    """Every fold on a line: nothing is left out of the means above."""
    rows = []
    for result in results:
        matrix = result.matrix(vote)
        figures = (average_f1(matrix), unweighted_average_recall(matrix), accuracy(matrix))
        last = result.epochs[-1] if result.epochs else None
        training = (f"{last.loss:.4f}", percent(last.accuracy)) if last else ("-", "-")
        rows.append((f"{result.repeat}.{result.fold}", str(matrix.sum()), *map(percent, figures), *training))
    header = ("fold", "utterances", "average F1", "UAR", "accuracy", "training loss", "training accuracy")
    return Table("Every fold (repeat.fold); training figures of the last epoch", header, tuple(rows))


def _computing(results: Sequence[FoldResult]) -> str:
    """On which backends the folds ran, and for how long."""
    backends = Counter(str(result.run["backend"]) for result in results if "backend" in result.run)
    where = ", ".join(f"{backend} {count(folds, 'folds')}" for backend, folds in sorted(backends.items()))
    seconds = sum(epoch.seconds for result in results for epoch in result.epochs)
    return f"Training took {seconds:.0f} s in all{f'; backend: {where}' if where else ''}."


def percent(fraction: float | np.float64) -> str:
    """A fraction in per cent with two decimals, as the paper prints it; "-" where undefined."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"


def ends(interval: Interval | None) -> str:
    """An interval in per cent; "-" where there is none."""
    return f"{percent(interval.low)} to {percent(interval.high)}" if interval else "-"
