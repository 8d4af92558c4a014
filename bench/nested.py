"""python -m bench.nested: what it is worth to have chosen a configuration on this corpus.

One frozen configuration was chosen on development data out of the training utterances of a few folds; of the other
folds, some of those utterances are test utterances. Nested selection avoids that: for every fold, the choice among a
few configurations is made anew, on a third of that fold's own training utterances; then a network with the chosen one
is trained on all of them and tested. The difference from the frozen configuration's figures on the same folds says
what a choice among these few owes to the test utterances; of what was tried and is not among them it says nothing.
The folds whose training utterances the frozen choice was made on come last: of those it never saw a test utterance.

The run folder under --out can be read by npser.report. Run again to go on after an interruption.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import protocol
from npser.cli import Parser, computing, run, set_threads
from npser.document import Table, text_table
from npser.errors import RunFailed, UserError
from npser.foldresult import FoldResult
from npser.packed import open_run
from npser.recipes import Recipe, changed, describe, recipe_for
from npser.runfolder import MAY_CHANGE, RunFolder

if TYPE_CHECKING:
    from npser.corpus import Corpus
    from npser.crossval import Fold, Settings, Versions
    from npser.progress import Progress

SHARE = 1 / 3  # of a fold's training utterances, held out to choose on
LATE = 3  # a configuration's score is its mean F1 after so many last epochs
DEVELOPED = {(0, 1), (0, 2)}  # folds of seed 0 in whose training utterances the recipes were chosen
# What is chosen among, beside the recipe as it is: each a change of it.
CANDIDATES = {
    "paper": ("segment_hop=16,epochs=8", "standardisation=global"),
    "best": ("epochs=8,speeds=", "speeds=,moving=False,final_rate=1"),
}


def candidates(recipe: Recipe, changes: Sequence[str]) -> list[Recipe]:
    """The recipe, and it with each of the changes ("field=value,field=value"); UserError for two that are equal."""
    made = [recipe]
    for change in changes:
        other = changed(recipe, _fields(change), "--candidate")
        if other in made:
            raise UserError(f"--candidate {change}: changes nothing, or is there already: leave it away")
        made.append(other)
    return made


def usual_changes(name: str, recipe: Recipe) -> list[str]:
    """Those of CANDIDATES that change this network's recipe of that name."""
    return [change for change in CANDIDATES[name] if changed(recipe, _fields(change)) != recipe]


def _fields(change: str) -> dict[str, str]:
    """ "speeds=0.9,1.1,epochs=8" -> {"speeds": "0.9,1.1", "epochs": "8"}; UserError where that is not its form."""
    parts = re.split(r",(?=\w+=)", change)
    if not all("=" in part for part in parts):
        raise UserError(f"--candidate {change}: FIELD=VALUE is wanted")
    return dict(part.split("=", 1) for part in parts)


def development_score(
    corpus: "Corpus", spoken: "Versions", fold: "Fold", settings: "Settings", progress: "Progress"
) -> float:
    """Mean F1 after the last epochs on a third of the fold's training utterances, trained on the others.

    Of a recipe that averages its weights, the F1 of these alone.
    """
    import numpy as np

    from npser.crossval import prepare
    from npser.features import WindowSet
    from npser.folds import development_split
    from npser.metrics import average_f1, confusion_matrix
    from npser.trainer import evaluate, train_epochs

    words, classes = (settings.seed, fold.repeat, fold.number), len(corpus.labels)
    train, held_out = (fold.train[i] for i in development_split(corpus.targets[fold.train], SHARE, words))
    model, task = prepare(spoken, corpus.targets, train, classes, settings, words)
    assert model.scale is not None
    windows = WindowSet([spoken[0][i] for i in held_out], model.scale, model.input_frames, settings.recipe.segment_hop)
    late = 1 if settings.recipe.average_last > 1 else LATE
    scores = []
    for epoch in train_epochs(model, task.optimiser(), task, progress):
        if epoch.epoch > task.epochs - late:
            decisions = evaluate(model, windows).probabilities.argmax(axis=1)
            scores.append(average_f1(confusion_matrix(corpus.targets[held_out], decisions, classes)))
    return float(np.mean(scores))


def select(options: argparse.Namespace, threads: int) -> RunFolder:
    """Choose, train and test, fold after fold, as far as it is not done yet."""
    from npser.corpus import open_corpus
    from npser.crossval import Settings, make_folds, only, train_and_test, training_steps
    from npser.folds import development_split
    from npser.frontend import read_versions
    from npser.models import input_frames
    from npser.progress import Progress
    from npser.runconfig import machine_of, run_config

    corpus = open_corpus(options.data)
    given = {name: getattr(options, name) for name in ("epochs", "segment_hop") if getattr(options, name)}
    recipe = recipe_for(options.recipe, options.arch, corpus.name == "demo", given)
    chosen_among = candidates(recipe, options.candidate or usual_changes(options.recipe, recipe))
    if len(chosen_among) < 2:
        raise UserError("--candidate: there is nothing to choose among: name a change of the recipe")
    settings = [Settings(options.arch, options.backend, options.seed, "sum", candidate) for candidate in chosen_among]
    shape = options.folds, options.repeats
    config = run_config(corpus, settings[0], options.recipe, "stratified", *shape, "float32", threads)
    about = {name: config[name] for name in ("backend", "threads", "versions")} | {"machine": machine_of(config)}
    config |= {"experiment": "nested", "candidates": [describe(candidate) for candidate in chosen_among]}
    config |= {"changes": options.candidate} if options.candidate else {}
    if options.frozen:
        frozen_folds(options.frozen, config)  # said now, not after hours
    wanted = only(make_folds(corpus, "stratified", *shape, options.seed), options.only)
    folder = RunFolder.open_or_create(options.out, config, MAY_CHANGE)
    finished = set(folder.finished())
    waiting = [fold for fold in wanted if (fold.repeat, fold.number) not in finished]
    waiting.sort(key=lambda fold: options.seed == 0 and (fold.repeat, fold.number) in DEVELOPED)
    spoken = {speeds: read_versions(corpus, "cpu", threads, speeds) for speeds in {s.recipe.speeds for s in settings}}
    frames = spoken[recipe.speeds][0]
    length = input_frames(options.arch)

    def steps(fold: "Fold", which: "Settings", inner: bool) -> int:
        train = fold.train
        if inner:
            words = (options.seed, fold.repeat, fold.number)
            train = train[development_split(corpus.targets[train], SHARE, words)[0]]
        return training_steps(frames, corpus.targets, train, length, which)

    # The configuration that will be trained is not known yet: the recipe as it is stands for it in the estimate.
    total = sum(steps(fold, settings[0], False) + sum(steps(fold, s, True) for s in settings) for fold in waiting)
    progress = Progress(total)
    for fold in waiting:
        scores = []
        for number, candidate in enumerate(settings):
            progress.begin_fold(f"fold {fold.name}, candidate {number}", steps(fold, candidate, True))
            try:
                scores.append(development_score(corpus, spoken[candidate.recipe.speeds], fold, candidate, progress))
            except RunFailed as error:  # it diverged: whoever chose would not choose it
                progress.warn(f"    {error}")
                progress.end_fold()
                scores.append(0.0)
            progress.say(f"    {describe(candidate.recipe)}: development F1 {100 * scores[-1]:.2f}")
        best = scores.index(max(scores))  # of equals the first: the recipe as it is
        progress.begin_fold(f"fold {fold.name}, chosen {best}", steps(fold, settings[best], False))
        chosen = {"chosen": best, "scores": [round(score, 6) for score in scores]}
        heard = spoken[settings[best].recipe.speeds]
        folder.save_fold(train_and_test(corpus, heard, fold, settings[best], progress, None, {**about, **chosen}))
    return folder


def table(config: Mapping[str, Any], results: Sequence[FoldResult], frozen: Sequence[FoldResult]) -> Table:
    """Every fold: development F1 of each candidate, the one chosen, and its F1 beside that of the frozen settings."""
    import numpy as np

    from npser.metrics import average_f1
    from npser.runreport import percent

    known = {(r.repeat, r.fold): average_f1(r.matrix("sum")) for r in frozen}
    rows, both = [], []
    for r in results:
        figures = average_f1(r.matrix("sum")), known.get((r.repeat, r.fold), float("nan"))
        scores = [percent(score) for score in r.run["scores"]]
        beside = *map(percent, figures), _points(figures[0] - figures[1])
        rows.append((f"{r.repeat}.{r.fold}", *scores, str(r.run["chosen"]), *beside))
        if not known or (r.repeat, r.fold) in known:  # the means are over the same folds
            both.append(figures)
    if both:
        nested, other = map(float, np.mean(both, axis=0))
        beside = percent(nested), percent(other), _points(nested - other)
        rows.append((f"mean of {len(both)}", *["" for _ in config["candidates"]], "", *beside))
    header = ("fold", *(f"dev {number}" for number in range(len(config["candidates"]))), "chosen")
    title = "; ".join(f"{number}: {candidate}" for number, candidate in enumerate(config["candidates"]))
    return Table(title, (*header, "nested F1", "frozen F1", "difference"), tuple(rows))


def _points(difference: float) -> str:
    return "-" if math.isnan(difference) else f"{100 * difference:+.2f}"


def differing(config: Mapping[str, Any], frozen: Mapping[str, Any]) -> list[str]:
    """In what a run is not that of the settings which are frozen, on the same folds."""
    own = {*MAY_CHANGE, "experiment", "candidates", "changes", "repeats"}
    return [key for key in {**config, **frozen} if key not in own and config.get(key) != frozen.get(key)]


def frozen_folds(run: Path, config: Mapping[str, Any]) -> list[FoldResult]:
    """The folds of the frozen settings' run. UserError where they are not the same folds of the same network."""
    folder = open_run(run)
    if others := differing(config, folder.config):
        raise UserError(f"--frozen {run}: another experiment, which differs from this one in {', '.join(others)}")
    return folder.load_folds()


def main(arguments: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m bench.nested", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    protocol.add_options(p, Path("runs/nested"))
    p.add_argument(
        "--candidate",
        action="append",
        metavar="FIELD=VALUE[,FIELD=VALUE]",
        help="a configuration to choose among, as changes of the recipe; may be repeated (default: of paper "
        f"{'; '.join(CANDIDATES['paper'])}; of best {'; '.join(CANDIDATES['best'])})",
    )
    p.add_argument("--frozen", type=Path, metavar="RUN", help="the run of the frozen settings to stand beside")
    options = p.parse_args(arguments)
    threads = set_threads(options.threads, options.backend)
    with computing(options.backend):
        folder = select(options, threads)
    frozen = frozen_folds(options.frozen, folder.config) if options.frozen else []
    shown = table(folder.config, folder.load_folds(), frozen)
    print(f"{shown.title}\n\n{text_table(shown)}")
    return 0


if __name__ == "__main__":
    run("bench.nested", main)
