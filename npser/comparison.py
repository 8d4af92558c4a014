"""Several runs side by side, with a paired test of each two."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from npser.analysis import RESAMPLES, paired, paired_folds, speaker_matrices, uar_interval
from npser.document import Block, Document, Table
from npser.errors import UserError
from npser.foldresult import FoldResult
from npser.metrics import ProtocolSummary
from npser.runreport import ends, percent, summary_of, what

Run = tuple[Path, Mapping[str, Any], Sequence[FoldResult]]  # folder, configuration, finished folds


def names_of(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: the last parts of its folder's path that tell it from the others."""
    paths = [path.resolve().parts for path, _, _ in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path, _, _ in runs]


def compare(runs: Sequence[Run]) -> Document:
    """The runs side by side. UserError for a run without a finished fold."""
    for path, _, results in runs:
        if not results:
            raise UserError(f"{path}: no fold is finished yet: nothing to compare")
    names = names_of(runs)
    summaries = [summary_of(config, results) for _, config, results in runs]
    blocks: list[Block] = [_figures(runs, names, summaries), _classes(names, summaries), *pairs(runs, names)]
    return Document(f"{len(runs)} runs side by side", tuple(blocks))


def _figures(runs: Sequence[Run], names: Sequence[str], summaries: Sequence[ProtocolSummary]) -> Table:
    rows = []
    for name, (_, config, results), summary in zip(names, runs, summaries, strict=True):
        between = ends(uar_interval(speaker_matrices(results, config["vote"])))
        figures = (summary.average_f1.mean, summary.average_f1.over_folds, summary.uar.pooled)
        rows.append(
            (name, what(config), str(len(results)), *map(percent, figures), between, percent(summary.accuracy.pooled))
        )
    header = ("run", "what", "folds", "average F1", "+- folds", "pooled UAR", "95 % interval", "accuracy")
    return Table("Figures in per cent; the interval is a bootstrap over speakers", header, tuple(rows), left=2)


def _classes(names: Sequence[str], summaries: Sequence[ProtocolSummary]) -> Table:
    labels = list(dict.fromkeys(label for summary in summaries for label in summary.labels))

    def f1(summary: ProtocolSummary, label: str) -> str:
        return percent(summary.mean.f1[summary.labels.index(label)]) if label in summary.labels else "-"

    rows = tuple((label, *(f1(summary, label) for summary in summaries)) for label in labels)
    return Table("F1 of each emotion, mean of the folds, in per cent", ("emotion", *names), rows)


def pairs(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """A paired test of each two runs, over their common utterances and over their common folds."""
    rows: list[tuple[str, ...]] = []
    over_folds: list[tuple[str, ...]] = []
    apart = []
    for (a, run_a), (b, run_b) in combinations(zip(names, runs, strict=True), 2):
        result = paired(run_a[2], run_b[2], run_a[1]["vote"], run_b[1]["vote"])
        if result is None:
            apart.append(f"{a} and {b}")
            continue
        if folds := _paired_folds(run_a, run_b):
            over_folds.append((f"{a} - {b}", str(folds[2]), f"{100 * folds[0]:+.2f}", probability(folds[1])))
        known = not math.isnan(result.low)
        between = f"{100 * result.low:+.2f} to {100 * result.high:+.2f}" if known else "-"
        difference = (f"{100 * result.difference:+.2f}", between, probability(result.p_speakers))
        better = (f"{result.a_better} : {result.b_better}", probability(result.p_utterances))
        rows.append((f"{a} - {b}", str(result.utterances), *difference, *better))
    blocks: list[Block] = []
    if rows:
        header = ("pair", "utterances", "UAR", "95 % interval", "p, speakers", "better : worse", "p, utterances")
        blocks.append(Table("Paired: difference of the UAR in points, over the common utterances", header, tuple(rows)))
        blocks.append(
            "An utterance counts with the share of its repeats that were right, of those that both runs have. "
            f"Interval: bootstrap over speakers, {RESAMPLES} resamples. p, speakers: how often a difference as large "
            "arises when the two runs are exchanged for whole speakers at random. better : worse counts the utterances "
            "that the first or the second run got right more often; p, utterances is the exact sign test on these "
            "counts (with one repeat McNemar's test), which takes utterances of one speaker for independent."
            + (" Not corrected for the number of pairs." if len(rows) > 1 else "")
        )
    if over_folds:
        columns = ("pair", "folds", "average F1", "p")
        blocks.append(
            Table("Paired: difference of the average F1 in points, over the folds", columns, tuple(over_folds))
        )
        blocks.append(
            "Both runs tested the same folds. p: the corrected resampled t test (Nadeau and Bengio 2003), which allows "
            "for training sets that overlap."
        )
    if apart:
        blocks.append(f"No utterance in common, so no paired test: {'; '.join(apart)}.")
    return blocks


def _paired_folds(a: Run, b: Run) -> tuple[float, float, int] | None:
    """`paired_folds` of two runs."""
    (_, config_a, folds_a), (_, config_b, folds_b) = a, b
    tested = len({u.file for results in (folds_a, folds_b) for result in results for u in result.utterances})
    corpus = config_a.get("utterances", tested)  # old runs do not say
    return paired_folds(folds_a, folds_b, config_a["vote"], config_b["vote"], max(corpus, tested))


def probability(p: float) -> str:
    """A p value: three decimals, small ones as a bound."""
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
