"""The figures of a report, with matplotlib (extra `plot`), each as PNG and SVG, and one page that holds them all."""

import html
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npser.analysis import learning_curves, speaker_matrices, uar_interval
from npser.cli import count
from npser.comparison import Run, names_of
from npser.document import Document
from npser.errors import UserError
from npser.files import write_atomically
from npser.foldresult import FoldResult
from npser.metrics import precision_recall_f1, unweighted_average_recall
from npser.runreport import summary_of

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "npser",
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold two dollar signs
}


def draw_run(config: Mapping[str, Any], results: Sequence[FoldResult], document: Document, target: Path) -> None:
    """Draw a run: confusion matrix, classes, speakers, learning curves. UserError without matplotlib or folds."""
    if not results:
        raise UserError("--plots: no fold is finished yet: nothing to draw")
    vote, labels = config["vote"], config["labels"]
    matrix = np.sum([result.matrix(vote) for result in results], axis=0)
    with _Canvas(target) as canvas:
        _confusion(canvas, matrix, labels)
        _class_dots(canvas, results, vote, labels)
        matrices = speaker_matrices(results, vote)
        if len(matrices) > 1 and "" not in matrices:
            _speakers(canvas, matrices)
        if learning_curves(results):
            _curves(canvas, results)
        canvas.page(document)


def draw_comparison(runs: Sequence[Run], document: Document, target: Path) -> None:
    """Draw several runs: their UARs with intervals, and the F1 of each emotion."""
    with _Canvas(target) as canvas:
        _forest(canvas, runs)
        _class_comparison(canvas, runs)
        canvas.page(document)


class _Canvas:
    """Makes figures in one style, and writes each as soon as it is drawn."""

    def __init__(self, target: Path) -> None:
        try:
            import matplotlib

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise UserError("--plots: needs matplotlib: pip install 'npser[plot]'") from error
        self.plt, self.target = plt, target
        self.style = matplotlib.rc_context(_STYLE)
        self.figures: list[tuple[str, str]] = []
        self.boxes = False  # drawn in the place of letters

    def __enter__(self) -> "_Canvas":
        try:
            self.target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.target}: cannot be made ({error.strerror})") from error
        self.style.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.boxes:
            print("--plots: boxes stand for letters that the font of the figures lacks", file=sys.stderr)
        self.style.__exit__(None, None, None)
        self.plt.close("all")

    def write(self, figure: Any, name: str, caption: str) -> None:
        files = {}
        for form in ("png", "svg"):
            data = io.BytesIO()
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else {}
            with warnings.catch_warnings(record=True) as complaints:
                warnings.filterwarnings("always", "Glyph .* missing from")
                figure.savefig(data, format=form, dpi=160, metadata=metadata)
            for complaint in complaints:
                if "missing from" in str(complaint.message):
                    self.boxes = True
                else:
                    warnings.warn_explicit(complaint.message, complaint.category, complaint.filename, complaint.lineno)
            files[form] = data.getvalue()
            write_atomically(self.target / f"{name}.{form}", files[form])
        self.plt.close(figure)
        self.figures.append((caption, _inline(files["svg"].decode(), name, caption)))

    def page(self, document: Document) -> None:
        write_atomically(self.target / "report.html", document.html(self.figures))


def _inline(svg: str, name: str, caption: str) -> str:
    """An SVG file as an element of a page, which screen readers take for one image.

    Its identifiers get a prefix, because other figures use the same ones.
    """
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
    return svg.replace('id="', f'id="{name}-').replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")


def _confusion(canvas: _Canvas, matrix: Any, labels: Sequence[str]) -> None:
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    k = len(labels)
    figure, axes = canvas.plt.subplots(figsize=(max(4.6, 0.78 * k + 1.2), max(4.0, 0.66 * k + 1.1)))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i in range(k):
        for j in range(k):
            if matrix[i, j]:
                colour = "white" if share[i, j] > 70 else "black"  # whichever stands out more
                axes.text(j, i - 0.1, f"{share[i, j]:.0f} %", ha="center", va="center", color=colour)
                axes.text(j, i + 0.24, str(matrix[i, j]), ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(k), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(k), labels)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    canvas.write(figure, "confusion", "Each row in per cent of the true emotion; below, the number of decisions.")


def _class_dots(canvas: _Canvas, results: Sequence[FoldResult], vote: str, labels: Sequence[str]) -> None:
    """F1 of each class: every fold a dot, the mean a bar."""
    f1 = 100 * np.array([precision_recall_f1(result.matrix(vote))[2] for result in results])  # (folds, K)
    figure, axes = canvas.plt.subplots(figsize=(6.4, 4.2))
    shift = np.random.default_rng(0).uniform(-0.22, 0.22, len(f1))  # so that equal dots do not hide each other
    for k in range(len(labels)):
        axes.plot(k + shift, f1[:, k], "o", color=_COLOURS[0], alpha=0.45, markersize=5, markeredgewidth=0)
        if not np.isnan(f1[:, k]).all():
            axes.plot([k - 0.32, k + 0.32], [np.nanmean(f1[:, k])] * 2, color=_COLOURS[1], linewidth=2.5)
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", rotation_mode="anchor")
    axes.set(ylim=(-3, 103), ylabel="F1, per cent", title="F1 of each emotion")
    axes.grid(False, axis="x")
    canvas.write(figure, "classes", f"Dots: {count(len(f1), 'folds')}. Bars: their means.")


def _speakers(canvas: _Canvas, matrices: Mapping[str, Any]) -> None:
    uars = {speaker: 100 * unweighted_average_recall(matrix) for speaker, matrix in matrices.items()}
    order = sorted(uars, key=uars.__getitem__)
    figure, axes = canvas.plt.subplots(figsize=(6.4, max(2.4, 0.32 * len(order) + 1.2)))
    interval = uar_interval(matrices)
    if interval:
        axes.axvspan(100 * interval.low, 100 * interval.high, color=_COLOURS[5], alpha=0.25, linewidth=0)
        axes.axvline(100 * interval.value, color=_COLOURS[0], linewidth=1.5)
    axes.plot([uars[s] for s in order], range(len(order)), "o", color=_COLOURS[1], markersize=7)
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="UAR, per cent", ylabel="speaker", title="UAR of each speaker")
    axes.locator_params(axis="x", steps=[1, 2, 5, 10])
    canvas.write(figure, "speakers", "Dots: single speakers. Line and band: the pooled UAR and its 95 % interval.")


def _curves(canvas: _Canvas, results: Sequence[FoldResult]) -> None:
    figure, (left, right) = canvas.plt.subplots(1, 2, figsize=(8.4, 3.6))
    for result in results:
        epochs = [epoch.epoch for epoch in result.epochs]
        left.plot(epochs, [epoch.loss for epoch in result.epochs], color=_COLOURS[0], alpha=0.3, linewidth=1)
        right.plot(epochs, [100 * epoch.accuracy for epoch in result.epochs], color=_COLOURS[0], alpha=0.3, linewidth=1)
    means = learning_curves(results)
    left.plot([n for n, _, _ in means], [losses.mean() for _, losses, _ in means], "o-", color=_COLOURS[1])
    right.plot([n for n, _, _ in means], [100 * values.mean() for _, _, values in means], "o-", color=_COLOURS[1])
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    right.set(xlabel="epoch", ylabel="per cent of windows", title="Training accuracy")
    left.set_ylim(bottom=0)
    right.set_ylim(top=100)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    canvas.write(figure, "curves", "Thin: every fold. Thick: their mean. Measured while training, dropout on.")


def _forest(canvas: _Canvas, runs: Sequence[Run]) -> None:
    names = names_of(runs)
    figure, axes = canvas.plt.subplots(figsize=(6.4, 1.4 + 0.45 * len(runs)))
    for n, (_, config, results) in enumerate(reversed(runs)):
        interval = uar_interval(speaker_matrices(results, config["vote"]))
        colour = _COLOURS[(len(runs) - 1 - n) % len(_COLOURS)]
        if interval:
            axes.plot([100 * interval.low, 100 * interval.high], [n, n], color=colour, linewidth=2)
        pooled = np.sum([result.matrix(config["vote"]) for result in results], axis=0)
        axes.plot(100 * unweighted_average_recall(pooled), n, "o", color=colour, markersize=8)
    axes.set_yticks(range(len(runs)), reversed(names))
    axes.set_ylim(-0.6, len(runs) - 0.4)
    axes.grid(False, axis="y")
    axes.set(xlabel="per cent", title="Pooled UAR")
    axes.locator_params(axis="x", steps=[1, 2, 5, 10])
    canvas.write(figure, "uar", "Dot: pooled UAR. Line: its 95 % interval over speakers.")


def _class_comparison(canvas: _Canvas, runs: Sequence[Run]) -> None:
    summaries = [summary_of(config, results) for _, config, results in runs]
    labels = list(dict.fromkeys(label for summary in summaries for label in summary.labels))
    figure, axes = canvas.plt.subplots(figsize=(max(6.4, 1.0 * len(labels) + 1), 4.2))
    width = 0.8 / len(runs)
    for n, (name, summary) in enumerate(zip(names_of(runs), summaries, strict=True)):
        at = [labels.index(label) + (n - (len(runs) - 1) / 2) * width for label in summary.labels]
        axes.bar(at, 100 * summary.mean.f1, 0.92 * width, color=_COLOURS[n % len(_COLOURS)], label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", rotation_mode="anchor")
    axes.set(ylim=(0, 100), ylabel="F1, per cent", title="F1 of each emotion")
    axes.grid(False, axis="x")
    figure.legend(loc="outside upper right", ncols=min(len(runs), 4))
    canvas.write(figure, "classes", "Mean of the per-fold F1.")
