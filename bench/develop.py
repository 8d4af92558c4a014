"""python -m bench.develop: choose settings without looking at a test fold.

Takes the training utterances of cross-validation folds, holds out a stratified third of them for development, trains on
the rest, and scores the development utterances after every epoch: with the weights as they are, with their mean over
the last three epochs (_mean), and by the networks of the last three epochs together (_votes). A fold's test utterances
are never read. Every trial is appended to a table that ships with the project, one line per epoch, without figures for
the one in which it diverged; a trial that the table has is not computed again. At the end, all trials of the network
are summed up, one line for each configuration.
"""

import argparse
import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.variants import VARIANTS, combined
from bench.variants import versions as versions_of
from npser.cli import Parser, computing, run, set_threads, versions, whole
from npser.document import Table, text_table
from npser.errors import RunFailed, UserError
from npser.files import require_place
from npser.recipes import ARCHITECTURES, NAMES, RECIPES, Recipe, changed, describe

TABLE = Path(__file__).parent / "results" / "development.csv"
COLUMNS = (
    "arch", "corpus", "folds", "fold", "held_out", "seed", "settings", "commit", "note", "epoch",
    "training_loss", "training_accuracy", "uar", "f1", "uar_majority", "uar_mean", "f1_mean", "seconds", "f1_votes",
)  # fmt: skip
KEY = COLUMNS[:7]  # what makes a trial
AVERAGED = 3  # last epochs whose weights are averaged (_mean), that vote together (_votes), that the summary looks at

Line = dict[str, Any]


def numbers(text: str) -> list[int]:
    """An argparse type: 0,3,5 or 0-9."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        listed = [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        listed = []
    if not listed:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,2 or 0-4")
    return listed


def fraction(text: str) -> float:
    """An argparse type: a part of something, neither nothing nor all of it."""
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m bench.develop", description=__doc__)
    p.add_argument("--arch", required=True, choices=ARCHITECTURES)
    p.add_argument("--data", help="demo, emodb or a folder, as for npser.train; must be said, but for --summary")
    p.add_argument("--recipe", choices=NAMES, default="paper", help="the recipe to start from (default: paper)")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the recipe")
    p.add_argument(
        "--variant",
        action="append",
        default=[],
        choices=[*VARIANTS],
        metavar="NAME",
        help=f"change what is no field: {'; '.join(f'{name}, {v.what}' for name, v in VARIANTS.items())}",
    )
    p.add_argument("--folds", type=whole(2), default=10, help="folds of the cross-validation (default: 10)")
    p.add_argument(
        "--fold", type=numbers, default=[0], help="whose training utterances are used, 0,3 or 0-4 (default: 0)"
    )
    p.add_argument(
        "--share",
        type=fraction,
        default=0.33,
        help="of the training utterances, held out for development (default: 0.33)",
    )
    p.add_argument("--seeds", type=numbers, default=[0], help="seeds of weights, order and dropout (default: 0)")
    p.add_argument("--backend", default="cpu", choices=("cpu", "cuda"), help="what computes (default: cpu)")
    p.add_argument("--threads", type=whole(1), help="processor cores to use (default: all)")
    p.add_argument("--table", type=Path, default=TABLE, help="where trials are kept (default: the project's table)")
    p.add_argument("--note", default="", help="what is special about this trial, for the table")
    p.add_argument("--summary", action="store_true", help="compute nothing, sum up what the table has")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    for given in options.set:
        if "=" not in given:
            raise UserError(f"--set {given}: FIELD=VALUE is wanted")
        if given.startswith("average_last="):
            raise UserError(f"--set {given}: every trial has columns for the mean of the last epochs' weights already")
    recipe = changed(RECIPES[options.recipe][options.arch], dict(part.split("=", 1) for part in options.set))
    recipe = replace(recipe, average_last=1)  # the mean weights have columns of their own
    if not options.summary:
        if options.data is None:
            raise UserError("--data: which corpus? demo, emodb or a folder")
        if max(options.fold) >= options.folds:
            raise UserError(f"--fold {max(options.fold)}: there are folds 0 to {options.folds - 1}")
        require_place(options.table, f"--table {options.table}")
        threads = set_threads(options.threads, options.backend)
        with computing(options.backend):
            _trials(options, recipe, threads)
    lines = [line for line in read(options.table) if line["arch"] == options.arch]
    print(text_table(summary(lines)))
    return 0


def _trials(options: argparse.Namespace, recipe: Recipe, threads: int) -> None:
    """Run the trials that the table has not yet."""
    from npser.corpus import open_corpus
    from npser.crossval import Settings, make_folds, prepare, training_steps
    from npser.features import WindowSet
    from npser.folds import development_split
    from npser.models import input_frames
    from npser.progress import Progress

    corpus = open_corpus(options.data)
    variant = combined(options.variant, options.arch)
    if variant.recording and not recipe.augmented:
        raise UserError(
            "--variant: one of them adds recordings, which only a recipe with speeds or moving windows hears"
        )
    settings = " ".join([describe(recipe), *(f"variant={name}" for name in sorted(options.variant))])
    had = {tuple(line[name] for name in KEY) for line in read(options.table)}
    waiting = [
        (fold, seed)
        for seed in options.seeds
        for fold in options.fold
        if (options.arch, corpus.name, str(options.folds), f"0.{fold}", f"{options.share:g}", str(seed), settings)
        not in had
    ]
    if not waiting:
        return
    speeds = list(dict.fromkeys([*recipe.speeds, *variant.speeds]))
    made, added = versions_of(corpus, options.backend, threads, speeds, variant)
    at = dict(zip((1.0, *speeds), made, strict=True))
    spoken = [*(at[speed] for speed in (1.0, *recipe.speeds)), *added]
    heard = [at[speed] for speed in (1.0, *variant.speeds)]
    commit = versions()["commit"]
    folds = make_folds(corpus, "stratified", options.folds, 1, 0)
    parts = {}
    for number in {fold for fold, _ in waiting}:
        train = folds[number].train
        parts[number] = [train[i] for i in development_split(corpus.targets[train], options.share, (0, number))]
    length = input_frames(options.arch)
    frozen = {seed: Settings(options.arch, options.backend, seed, "sum", recipe) for seed in options.seeds}
    steps = {n: training_steps(spoken[0], corpus.targets, parts[n][0], length, frozen[waiting[0][1]]) for n in parts}
    progress = Progress(sum(steps[fold] for fold, _ in waiting))
    for fold, seed in waiting:
        train, development = parts[fold]
        progress.say(f"{options.arch}, {settings}, fold 0.{fold}, seed {seed}")
        progress.begin_fold(f"fold 0.{fold}", steps[fold])
        model, task = prepare(spoken, corpus.targets, train, len(corpus.labels), frozen[seed], (seed, 0, fold))
        assert model.scale is not None
        if variant.network:
            variant.network(model)
        scale, hop = model.scale, recipe.segment_hop
        held_out = [WindowSet([frames[i] for i in development], scale, length, hop) for frames in heard]
        lines: list[Line] = []
        try:
            for line in _epochs(model, task, held_out, corpus.targets[development], progress):
                lines.append(line)
        except RunFailed as error:
            progress.say(str(error))
            progress.end_fold()
            lines.append({"epoch": len(lines) + 1})  # without figures
        about = {"arch": options.arch, "corpus": corpus.name, "folds": options.folds, "fold": f"0.{fold}"}
        about |= {
            "held_out": f"{options.share:g}",
            "seed": seed,
            "settings": settings,
            "commit": commit,
            "note": options.note,
        }
        append(options.table, [about | line for line in lines])


def _heard(model: Any, held_out: Sequence[Any]) -> Any:
    """What a network says of the development utterances: the votes of all their windows, at all speeds."""
    import numpy as np

    from npser.inference import window_probabilities
    from npser.trainer import vote

    p = [window_probabilities(model, windows.recordings()) for windows in held_out]
    return vote(np.concatenate(p), np.concatenate([windows.owner for windows in held_out]))


def _epochs(model: Any, task: Any, held_out: Sequence[Any], targets: Any, progress: Any) -> Iterable[Line]:
    """Train, and score the development utterances after every epoch."""
    import numpy as np

    from npser.metrics import average_f1, confusion_matrix, unweighted_average_recall
    from npser.trainer import train_epochs

    last: list[dict[str, Any]] = []
    said: list[Any] = []
    for result in train_epochs(model, task.optimiser(), task, progress):
        now = {name: value.copy() for name, value in model.params.items()}
        last = [*last[1 - AVERAGED :], now]
        votes = _heard(model, held_out)
        said = [*said[1 - AVERAGED :], votes.probabilities]
        model.set_params({name: np.mean([params[name] for params in last], axis=0) for name in now})
        averaged = _heard(model, held_out)
        model.set_params(now)
        matrices = [
            confusion_matrix(targets, predicted, model.settings["classes"])
            for predicted in (
                votes.probabilities.argmax(1),
                votes.majority,
                averaged.probabilities.argmax(1),
                sum(said).argmax(1),
            )
        ]
        uar, by_majority, uar_mean, _ = map(unweighted_average_recall, matrices)
        f1, _, f1_mean, f1_votes = map(average_f1, matrices)
        progress.say(f"    development F1 {100 * f1:.1f}, of the mean weights {100 * f1_mean:.1f}")
        figures = {"training_loss": result.loss, "training_accuracy": result.accuracy, "uar": uar, "f1": f1}
        figures |= {"uar_majority": by_majority, "uar_mean": uar_mean, "f1_mean": f1_mean, "f1_votes": f1_votes}
        yield {
            "epoch": result.epoch,
            **{name: f"{value:.4f}" for name, value in figures.items()},
            "seconds": f"{result.seconds:.1f}",
        }


# --- the table ---------------------------------------------------------------------------------------------------


def read(table: Path) -> list[dict[str, str]]:
    """All lines of the table, none where there is none."""
    if not table.exists():
        return []
    try:
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise ValueError(f"it has no column {min(missing)}")
    except (OSError, ValueError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--table {table}: cannot be read as a table of trials ({why}): name another") from error
    return lines


def append(table: Path, lines: Sequence[Line]) -> None:
    """Add a trial's lines in one write, so that several processes may use one table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not table.exists():
        writer.writeheader()
    writer.writerows(lines)
    handle = os.open(table, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, text.getvalue().encode())
    finally:
        os.close(handle)


def summary(lines: Iterable[Line]) -> Table:
    """One row for each configuration: means over its trials (folds and seeds) and their spread."""
    import numpy as np

    trials: dict[tuple[str, ...], dict[tuple[str, str], list[Line]]] = {}
    for line in lines:
        made = trials.setdefault(tuple(line[name] for name in ("corpus", "settings", "held_out", "folds")), {})
        made.setdefault((line["fold"], line["seed"]), []).append(line)
    rows = []
    for settings, made in trials.items():
        late = np.array(
            [[np.mean([_number(line[c]) for line in t[-AVERAGED:]]) for c in ("uar", "f1")] for t in made.values()]
        )
        final = np.array([[_number(t[-1][c]) for c in ("f1", "f1_mean", "f1_votes")] for t in made.values()])
        spread = late[:, 1].std(ddof=1) if len(made) > 1 else np.nan
        figures = (*late.mean(axis=0), spread, *final.mean(axis=0))
        shown = ("-" if np.isnan(x) else f"{100 * x:.1f}" for x in figures)
        rows.append((*settings, str(len(made)), *shown))
    header = (
        "corpus",
        "settings",
        "held out",
        "folds",
        "trials",
        "late UAR",
        "late F1",
        "+-",
        "last F1",
        "mean weights F1",
        "votes F1",
    )
    return Table("Development scores", header, tuple(rows), left=2)


def _number(text: str | None) -> float:
    return float(text) if text else float("nan")


if __name__ == "__main__":
    run("bench.develop", main)
