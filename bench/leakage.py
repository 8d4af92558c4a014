"""python -m bench.leakage: what four practices do to the figures of one and the same network.

The paper's words leave room for each of them, and each may raise scores without making a network any better. They are
experiments of their own here, beside the honest protocol, with the same networks and the same settings. Each is a run
folder under --out, which npser.report reads, too. Run again to go on after an interruption.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from bench import protocol
from npser.cli import Parser, computing, run, set_threads
from npser.document import Table, text_table
from npser.foldresult import FoldResult, fold_result
from npser.recipes import Recipe, recipe_for
from npser.runfolder import MAY_CHANGE, RunFolder

if TYPE_CHECKING:
    from npser.comparison import Run
    from npser.corpus import Corpus
    from npser.crossval import Fold, Frames, Settings
    from npser.progress import Progress
    from npser.trainer import Votes

# Each training serves several experiments: the same networks, looked at in different ways.
TRAININGS = {
    "honest": ("honest", "best-epoch", "windows-scored", "few-windows-voted"),
    "oversampled-first": ("oversampled-first",),
    "windows-split": ("windows-split", "windows-split-voted"),
}
EXPERIMENTS = {
    "honest": "utterances split into folds, oversampled in training only, decisions by utterance, last epoch",
    "oversampled-first": (
        "utterances repeated until all classes are equally large, then split: copies of test utterances are in training"
    ),
    "windows-split": (
        "windows, not utterances, split into folds, so that test windows overlap with training windows of the same "
        "recording; single windows scored"
    ),
    "windows-split-voted": (
        "the same networks; the test windows of an utterance, one in as many as there are folds, decide together"
    ),
    "best-epoch": "honest training, but of all epochs the one with the best F1 on the test fold is kept",
    "windows-scored": "honest training, but single windows are scored, not utterances",
    "few-windows-voted": (
        "honest training, but the windows of an utterance are dealt into as many parts as there are folds, and each "
        "part decides alone, by as few as in windows-split-voted"
    ),
}
# Beside which experiment each is set: the one that differs in the practice alone.
EQUALS = {"windows-split": "windows-scored", "windows-split-voted": "few-windows-voted"}
CHANGE = (
    "change: the mean difference from the experiment named before it, over the folds of the same numbers. Experiments "
    "with honest's own networks test the same utterances in each; oversampled-first and windows-split deal theirs "
    "anew, so that their changes mean little before all folds are done."
)


# --- the practices -----------------------------------------------------------------------------------------------


def repeated(corpus: "Corpus", frames: "Frames", seed: int) -> "tuple[Corpus, Frames]":
    """Every class as large as the largest, by copies of utterances: name+1, name+2 ..."""
    import numpy as np

    from npser.folds import random_oversampling

    chosen = random_oversampling(corpus.targets, np.random.default_rng((seed, 0)))
    copies: dict[int, int] = {}
    utterances = []
    for i in chosen.tolist():
        n = copies[i] = copies.get(i, -1) + 1
        u = corpus.utterances[i]
        utterances.append(replace(u, name=f"{u.name}+{n}") if n else u)
    return replace(corpus, utterances=tuple(utterances)), [frames[i] for i in chosen]


def cut(corpus: "Corpus", frames: "Frames", length: int, hop: int) -> "tuple[Corpus, Frames]":
    """Every window as an utterance of its own: name@first frame."""
    from npser.features import window_count

    utterances, pieces = [], []
    for u, x in zip(corpus.utterances, frames, strict=True):
        for n in range(window_count(len(x), length, hop)):
            utterances.append(replace(u, name=f"{u.name}@{n * hop}"))
            pieces.append(x[n * hop : n * hop + length])
    return replace(corpus, utterances=tuple(utterances)), pieces


def voted(result: FoldResult) -> FoldResult:
    """The windows (name@frame) of each utterance as one decision, by the mean of their probabilities."""
    import numpy as np

    from npser.trainer import vote

    names = [u.file.rsplit("@", 1)[0] for u in result.utterances]
    files = list(dict.fromkeys(names))
    owner = np.array([files.index(name) for name in names])
    first = [names.index(name) for name in files]
    votes = vote(np.array([u.probabilities for u in result.utterances]), owner)
    return _result(result, votes, files, [result.utterances[i] for i in first])


def voted_in_parts(result: FoldResult, parts: int, seed: int) -> FoldResult:
    """The windows (name@frame) of each utterance, dealt into so many parts; each part one decision, name@number."""
    import numpy as np

    dealt = np.random.default_rng((seed, result.repeat, result.fold)).permutation(len(result.utterances))
    names = [u.file.rsplit("@", 1)[0] for u in result.utterances]
    seen: Counter[str] = Counter()
    renamed = {}
    for i in dealt.tolist():
        renamed[i] = f"{names[i]}@{seen[names[i]] % parts}@"
        seen[names[i]] += 1
    utterances = [replace(u, file=f"{renamed[i]}{i}") for i, u in enumerate(result.utterances)]
    return voted(replace(result, utterances=tuple(utterances)))


def _result(result: FoldResult, votes: "Votes", files: Sequence[str], utterances: Sequence[Any]) -> FoldResult:
    """The same fold with other decisions."""
    return fold_result(
        repeat=result.repeat,
        fold=result.fold,
        labels=result.labels,
        vote=result.vote,
        epochs=result.epochs,
        files=files,
        speakers=[u.speaker for u in utterances],
        truth=[result.labels.index(u.truth) for u in utterances],
        probabilities=votes.probabilities,
        majority=votes.majority,
        run=result.run,
    )


# --- training ----------------------------------------------------------------------------------------------------


def train_and_look(
    corpus: "Corpus",
    frames: "Frames",
    fold: "Fold",
    settings: "Settings",
    progress: "Progress",
    about: dict[str, Any],
) -> dict[str, FoldResult]:
    """One fold, trained as it should be: the honest result, the best epoch's, and that of single windows."""
    import time

    import numpy as np

    from npser.crossval import prepare, seconds_since, tested_fold
    from npser.features import WindowSet
    from npser.inference import window_probabilities
    from npser.metrics import average_f1
    from npser.trainer import Votes, train_epochs, vote

    started = time.monotonic()
    targets, words = corpus.targets, (settings.seed, fold.repeat, fold.number)
    model, task = prepare([frames], targets, fold.train, len(corpus.labels), settings, words)
    assert model.scale is not None
    test = WindowSet([frames[i] for i in fold.test], model.scale, model.input_frames, settings.recipe.segment_hop)
    epochs, looks = [], []
    for epoch in train_epochs(model, task.optimiser(), task, progress):
        epochs.append(epoch)
        p = window_probabilities(model, test.recordings())
        timed = {**about, "seconds": seconds_since(started)}
        looks.append(tested_fold(corpus, fold, settings, epochs, vote(p, test.owner), timed))
    single = Votes(p.astype(np.float64), p.argmax(axis=1))
    tested = looks[-1].utterances
    windows = [f"{tested[i].file}@{start}" for i, start in zip(test.owner, test.start, strict=True)]
    return {
        "honest": looks[-1],
        "best-epoch": max(looks, key=lambda look: average_f1(look.matrix(settings.vote))),
        "windows-scored": _result(looks[-1], single, windows, [tested[i] for i in test.owner]),
    }


def derive(folders: dict[str, RunFolder], folds: int, seed: int, about: dict[str, Any]) -> None:
    """What other decisions by the same windows make of the folds that are there; `about` is recorded with them."""
    for name, source in (("windows-split-voted", "windows-split"), ("few-windows-voted", "windows-scored")):
        for fold in set(folders[source].finished()) - set(folders[name].finished()):
            windows = folders[source].load_fold(*fold)
            together = voted(windows) if source == "windows-split" else voted_in_parts(windows, folds, seed)
            folders[name].save_fold(replace(together, run=decided_by(about, windows.run)))


def decided_by(about: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """The record of decisions that are made anew; whoever trained is named, too, where it was another program."""
    from npser.crossval import origin_of

    if origin_of(about) == origin_of(trained):
        return dict(trained)
    return {**trained, **about, "also_by": [*trained.get("also_by", []), f"{origin_of(trained)}, which trained"]}


def without_augmentation(recipe: Recipe) -> Recipe:
    """The recipe as the practices are compared by: windows that are utterances of their own cannot move."""
    return replace(recipe, speeds=(), moving=False)


def _waiting(folds: "Sequence[Fold]", folders: Sequence[RunFolder]) -> "Iterator[Fold]":
    """The folds that one of these experiments does not have yet."""
    finished = set.intersection(*(set(folder.finished()) for folder in folders))
    return (fold for fold in folds if (fold.repeat, fold.number) not in finished)


def experiments(options: argparse.Namespace, threads: int) -> list[RunFolder]:
    """Run what is not done yet; returns all run folders, in the order of the table."""
    from npser.corpus import open_corpus
    from npser.crossval import Settings, make_folds, only, train_and_test, training_steps
    from npser.frontend import read_frames
    from npser.models import input_frames
    from npser.progress import Progress
    from npser.runconfig import machine_of, run_config

    corpus = open_corpus(options.data)
    given = {name: getattr(options, name) for name in ("epochs", "segment_hop") if getattr(options, name)}
    recipe = without_augmentation(recipe_for(options.recipe, options.arch, corpus.name == "demo", given))
    settings = Settings(options.arch, options.backend, options.seed, "sum", recipe)
    frames = read_frames(corpus, "cpu", threads)
    length = input_frames(options.arch)
    material = {
        "honest": (corpus, frames),
        "oversampled-first": repeated(corpus, frames, options.seed),
        "windows-split": cut(corpus, frames, length, recipe.segment_hop),
    }
    shape = options.folds, options.repeats
    chosen = {
        training: only(make_folds(spoken, "stratified", *shape, options.seed), options.only)
        for training, (spoken, _) in material.items()
    }
    config = run_config(corpus, settings, options.recipe, "stratified", *shape, "float32", threads)
    about = {name: config[name] for name in ("backend", "threads", "versions")} | {"machine": machine_of(config)}
    folders = {
        name: RunFolder.open_or_create(options.out / name, {**config, "experiment": name}, MAY_CHANGE)
        for name in EXPERIMENTS
    }
    derive(folders, options.folds, options.seed, about)
    work = []
    for training, folds in chosen.items():
        work += [(training, fold) for fold in _waiting(folds, [folders[name] for name in TRAININGS[training]])]
    work.sort(key=lambda item: (item[1].repeat, item[1].number))  # a fold of every experiment before the next fold
    steps = [training_steps(material[t][1], material[t][0].targets, f.train, length, settings) for t, f in work]
    progress = Progress(sum(steps))
    for (training, fold), count in zip(work, steps, strict=True):
        spoken, heard = material[training]
        progress.begin_fold(f"{training} {fold.name}", count)
        if training == "honest":
            results = train_and_look(spoken, heard, fold, settings, progress, about)
        else:
            results = {training: train_and_test(spoken, [heard], fold, settings, progress, None, about)}
        for name, result in results.items():
            folders[name].save_fold(result)
        derive(folders, options.folds, options.seed, about)
    return list(folders.values())


def table(runs: "Sequence[Run]") -> Table:
    """What each practice does to F1; runs: one of each experiment, of the same settings. See CHANGE."""
    import numpy as np

    from npser.metrics import average_f1
    from npser.runreport import percent, summary_of

    made = {run[1]["experiment"]: run for run in runs if run[2]}
    f1 = {n: {(r.repeat, r.fold): average_f1(r.matrix("sum")) for r in folds} for n, (_, _, folds) in made.items()}
    rows = []
    for name in EXPERIMENTS:
        if name in made:
            s = summary_of(*made[name][1:])
            equal = EQUALS.get(name, "honest")
            changes = [value - f1[equal][fold] for fold, value in f1[name].items() if fold in f1.get(equal, {})]
            beside = (equal, f"{100 * np.mean(changes):+.2f}") if changes and name != "honest" else ("-", "-")
            figures = (s.average_f1.mean, s.average_f1.over_folds, s.uar.mean, s.accuracy.mean)
            shown = list(map(percent, figures))
            rows.append((name, str(s.folds), shown[0], *beside, *shown[1:]))
    header = ("experiment", "folds", "average F1", "beside", "change", "+- folds", "UAR", "accuracy")
    return Table("what each practice does, figures in per cent, means of the folds", header, tuple(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    described = [fill(f"{name}: {what}", 110, subsequent_indent="    ") for name, what in EXPERIMENTS.items()]
    p = Parser(
        prog="python -m bench.leakage",
        description=f"{__doc__}\n" + "\n".join(described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    protocol.add_options(p, Path("runs/leakage"))
    options = p.parse_args(arguments)
    threads = set_threads(options.threads, options.backend)
    with computing(options.backend):
        print(text_table(table([(f.path, f.config, f.load_folds()) for f in experiments(options, threads)])))
        print(f"\n{fill(CHANGE, 110)}")
    return 0


if __name__ == "__main__":
    run("bench.leakage", main)
