"""python -m npser.train: cross-validated training of the paper's networks.

Only the options are read here at first: NumPy and Numba are imported when they prove valid, after the number of
threads is known, so that `--help` answers at once.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npser.cli import computing, count, run, set_threads
from npser.errors import RunFailed, UserError, printable
from npser.options import read
from npser.recipes import as_settings, from_settings, recipe_for

if TYPE_CHECKING:
    from npser.corpus import Corpus
    from npser.crossval import Fold, Frames
    from npser.models import Model
    from npser.progress import Progress
    from npser.runfolder import RunFolder

DEMO_FOLDS, DEMO_REPEATS = 2, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, raises UserError or RunFailed."""
    options = read(arguments)
    threads = set_threads(None if options.dask else options.threads, options.backend)  # --dask: those of other machines
    if options.workers > threads:
        raise UserError(f"--workers {options.workers}: they share {count(threads, 'threads')}: use at most so many")
    threads //= options.workers

    from npser.corpus import cross_corpus, open_corpus

    with computing(options.backend, options.precision):
        corpus = open_corpus(options.data)
        if options.test_data:
            corpus = cross_corpus(corpus, open_corpus(options.test_data, "--test-data"))
        demo = corpus.name == "demo"
        config = _config(options, corpus, threads, demo)
        if options.cv == "none":
            return _fit_everything(options, corpus, config)
        return _cross_validate(options, corpus, config)


def _config(options: argparse.Namespace, corpus: "Corpus", threads: int, demo: bool) -> dict[str, Any]:
    """config.json of the run that the options ask for."""
    from npser.crossval import Settings
    from npser.runconfig import run_config

    given = {name: getattr(options, name) for name in ("epochs", "batch_size", "segment_hop", "share_windows")}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = recipe_for(options.recipe, options.arch, demo, given)
    folds = len(corpus.speakers) if options.cv == "speaker" else options.folds or (DEMO_FOLDS if demo else 10)
    if options.cv == "speaker" and options.folds not in (None, folds):
        raise UserError(f"--folds {options.folds}: --cv speaker makes one fold for each of the {folds} speakers")
    if options.cv == "split":
        folds = 1
        if options.folds not in (None, 1):
            raise UserError(f"--folds {options.folds}: a given split of training and test makes one fold")
    repeats = options.repeats or (DEMO_REPEATS if demo else 5)
    settings = Settings(options.arch, options.backend, options.seed, options.vote, recipe)
    return run_config(corpus, settings, options.recipe, options.cv, folds, repeats, options.precision, threads)


def _introduce(config: dict[str, Any], corpus: "Corpus", frames: "Frames", plan: str) -> None:
    """The first lines: what will be run, and on what."""
    from npser.audio import SAMPLE_RATE
    from npser.features import HOP
    from npser.models import parameter_count
    from npser.runconfig import computed_by

    seconds = sum(map(len, frames)) * HOP / SAMPLE_RATE
    parameters = parameter_count(config["arch"], len(corpus.labels))
    source = (
        "the built-in, generated demonstration corpus" if corpus.name == "demo" else f"corpus {printable(corpus.name)}"
    )
    known = [s for s in corpus.speakers if s]
    by = f" by {count(len(known), 'speakers')}" if known else ""
    by += " and unknown ones" if known and "" in corpus.speakers else ""
    tested = sum(u.split == "test" for u in corpus.utterances) if config["cv"] == "split" else 0
    sides = f" ({len(corpus.utterances) - tested} to train on, {tested} to test on)" if tested else ""
    print(
        f"{config['arch']} on {source}: {len(corpus.utterances)} utterances{by}{sides}, {len(corpus.labels)} emotions, "
        f"{seconds / 60:.1f} min of speech"
    )
    print(
        f"{parameters / 1e6:.3f} million parameters, backend {computed_by(config)}, "
        f"{count(config['threads'], 'threads')}, seed {config['seed']}"
    )
    print(plan, flush=True)
    for line in corpus.skipped[:10]:
        print(f"skipped {printable(line)}", file=sys.stderr)
    if len(corpus.skipped) > 10:
        print(f"skipped {count(len(corpus.skipped) - 10, 'more files')}", file=sys.stderr)
    if corpus.skipped:
        print(f"skipped {count(len(corpus.skipped), 'files')} in all", file=sys.stderr, flush=True)


def _warn_of_compilation(backend: str, progress: "Progress") -> None:
    import kernels

    rung = kernels.rung(backend)
    if backend != "reference" and rung.cache_is_cold():
        kept = backend == "cpu" or rung.keeps_kernels()
        often = "once; they are kept for the next start" if kept else "at every start"
        progress.say(f"compiling kernels ({often}) ...")


def _cross_validate(options: argparse.Namespace, corpus: "Corpus", config: dict[str, Any]) -> int:
    from npser.crossval import make_folds, only, run_fold, training_steps
    from npser.frontend import read_versions
    from npser.models import input_frames
    from npser.progress import Progress
    from npser.runconfig import machine_of, settings_of
    from npser.runreport import render_text

    folds = make_folds(corpus, config["cv"], config["folds"], config["repeats"], config["seed"])
    chosen = only(folds, options.only)
    folder = _open_folder(options, config)
    settings = settings_of(config)
    spoken = read_versions(corpus, config["backend"], config["threads"], settings.recipe.speeds)
    frames = spoken[0]
    length = input_frames(config["arch"])
    finished = set(folder.finished())
    waiting = [fold for fold in chosen if (fold.repeat, fold.number) not in finished]
    steps = {f.name: training_steps(frames, corpus.targets, f.train, length, settings) for f in waiting}
    total = sum(steps.values())
    _introduce(config, corpus, frames, _plan(config, options, len(chosen), len(waiting), total, folder))
    progress = Progress(total)
    if waiting:
        _warn_of_compilation(config["backend"], progress)
    for fold in waiting:
        if unheard := set(corpus.targets[fold.test]) - set(corpus.targets[fold.train]):
            labels = ", ".join(corpus.labels[k] for k in sorted(unheard))
            progress.warn(f"fold {fold.name} tests {printable(labels)}, of which its training utterances have none")
    about = {key: config[key] for key in ("backend", "precision", "threads", "vote", "versions")}
    about["machine"] = machine_of(config)
    if waiting and (options.dask or (options.workers > 1 and len(waiting) > 1)):
        _in_processes(options, folder, waiting, about | {"workers": options.workers})
    else:
        about["threads"] = set_threads(config["threads"] * options.workers, config["backend"])  # nobody to share with
        for fold in waiting:
            progress.begin_fold(f"fold {fold.name}", steps[fold.name])
            run_fold(corpus, spoken, fold, settings, folder, progress, options.checkpoint, about)
    if not waiting:
        folder.write_tables()  # the vote may have changed
    missing = [fold.name for fold in chosen if (fold.repeat, fold.number) not in folder.finished()]
    if missing:
        raise RunFailed(f"{folder.path}: fold {missing[0]} is not there any more: run the same command again")
    print()
    print(render_text(folder.config, folder.load_folds()), end="")
    print(f"\nEverything is in {folder.path}: report.md, predictions.csv, folds/.")
    return 0


def _in_processes(
    options: argparse.Namespace, folder: "RunFolder", waiting: "list[Fold]", about: dict[str, Any]
) -> None:
    """--workers and --dask: the folds side by side."""
    from npser.workers import Job, run_locally, run_on_dask

    keep = options.checkpoint and not options.dask  # other machines do not see the run folder
    jobs = [
        Job(
            data=options.data,
            test_data=options.test_data,
            config=folder.config,
            repeat=fold.repeat,
            fold=fold.number,
            checkpoint=str(folder.checkpoint_path(fold.repeat, fold.number)) if keep else None,
            about=about,
            threads=options.threads if options.dask else folder.config["threads"],
        )
        for fold in waiting
    ]
    if options.dask:
        run_on_dask(jobs, folder, options.dask)
    else:
        run_locally(jobs, folder, options.workers)


def _open_folder(options: argparse.Namespace, config: dict[str, Any]) -> "RunFolder":
    from npser.runfolder import MAY_CHANGE, RunFolder

    recipe = "" if config["recipe"] == "paper" else f"-{config['recipe']}"
    out = options.out or Path("runs") / f"{config['arch']}-{config['corpus']}{recipe}-s{config['seed']}"
    if options.cv == "none" and not options.out:
        out = out.with_name(f"{out.name}-all")  # the cross-validation of the same network lies in the usual place
    return RunFolder.open_or_create(out, config, (*MAY_CHANGE, "repeats"), options.only)


def _plan(
    config: dict[str, Any], options: argparse.Namespace, chosen: int, waiting: int, steps: int, folder: "RunFolder"
) -> str:
    kinds = {"stratified": "stratified folds", "speaker": "folds, one for each speaker"}
    kinds["split"] = "fold, training and test as given,"
    lines = [
        f"recipe {config['recipe']}: {config['folds']} {kinds[config['cv']]} x {count(config['repeats'], 'repeats')}, "
        f"{count(config['epochs'], 'epochs')} of windows {count(config['segment_hop'], 'frames')} apart, "
        f"batches of {config['batch_size']}"
    ]
    if options.only:
        lines.append(f"only repeat {options.only[0]}, fold {options.only[1]}")
    if waiting < chosen:
        lines.append(f"{chosen - waiting} of {chosen} folds are finished already")
    if waiting:
        lines.append(f"{count(steps, 'updates')} to do; results go to {folder.path}")
    return "; ".join(lines)


def _fit_everything(options: argparse.Namespace, corpus: "Corpus", config: dict[str, Any]) -> int:
    """--cv none: one model on all utterances, saved."""
    import numpy as np

    from npser.crossval import origin_of, prepare, training_steps
    from npser.files import require_place, sweep
    from npser.frontend import read_versions
    from npser.modelfile import score_of
    from npser.models import input_frames
    from npser.progress import Progress
    from npser.runconfig import machine_of, settings_of
    from npser.trainer import Checkpoint, fit

    score = _measured_score(options.score_from, config) if options.score_from else None
    config |= {"folds": 0, "repeats": 1}
    folder = _open_folder(options, config)
    path = options.save or folder.path / "model.npz"
    require_place(path, f"--save {path}")
    settings = settings_of(config)
    spoken = read_versions(corpus, config["backend"], config["threads"], settings.recipe.speeds)
    frames = spoken[0]
    everything = np.arange(len(frames))
    total = training_steps(frames, corpus.targets, everything, input_frames(config["arch"]), settings)
    plan = (
        f"recipe {config['recipe']}: one model on everything, {count(config['epochs'], 'epochs')} of "
        f"windows {count(config['segment_hop'], 'frames')} apart, "
        f"batches of {config['batch_size']}; {count(total, 'updates')} to do; the model goes to {path}"
    )
    _introduce(config, corpus, frames, plan)
    progress = Progress(total)
    _warn_of_compilation(config["backend"], progress)
    progress.begin_fold("all data", total)
    words = (config["seed"], 0, 0)
    checkpoint_path = folder.checkpoint_path(0, 0)
    training = {**config, "machine": machine_of(config)}
    identity = f"{config['arch']} {words}"
    checkpoint = Checkpoint(checkpoint_path, identity, progress, origin_of(training)) if options.checkpoint else None
    model, task = prepare(spoken, corpus.targets, everything, len(corpus.labels), settings, words)
    epochs = fit(model, task, progress, checkpoint)
    if checkpoint and checkpoint.also_by:
        training["also_by"] = checkpoint.also_by
    model.labels, model.training = corpus.labels, training
    model.cross_validation = score
    sweep(path.resolve().parent, re.compile(re.escape(path.resolve().name)))
    try:
        model.save(path, options.storage)
    except OSError as error:
        raise RunFailed(f"--save {path}: cannot be written ({error.strerror})") from error
    except ValueError as error:
        raise RunFailed(f"--storage {options.storage}: {error}; save as float32") from error
    checkpoint_path.unlink(missing_ok=True)
    print(
        f"saved {path}: training accuracy of the last epoch {100 * epochs[-1].accuracy:.1f} %, of windows, dropout on"
    )
    if score:
        print(f"it carries the score of {options.score_from}: {score_of(score)}")
    if options.storage == "float16":
        print(_rounding_loss(model, path, frames, corpus, settings.recipe.segment_hop))
    return 0


def _measured_score(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The figures of a cross-validation for the model file; UserError unless it is of the same settings and data.

    What an experiment says (`bench.leakage`, `bench.nested`), which has all of these in common, is no score of a model.
    """
    from npser.analysis import speaker_matrices, uar_interval
    from npser.packed import open_run
    from npser.runreport import summary_of

    folder = open_run(run)
    same = ["arch", "utterances_sha256", "audio_sha256", "labels", *as_settings(from_settings(config))]
    same += ["optimiser", "features", "experiment"]
    differing = [key.removesuffix("_sha256") for key in same if folder.config.get(key) != config.get(key)]
    if differing:
        raise UserError(f"--score-from {run}: another training, which differs from this one in {', '.join(differing)}")
    results = folder.load_folds()
    if not results:
        raise UserError(f"--score-from {run}: no fold is finished there")
    vote = "sum"  # as the model will decide, whatever the run's vote
    summary = summary_of({**folder.config, "vote": vote}, results)
    interval = uar_interval(speaker_matrices(results, vote))
    return {
        "cv": folder.config.get("cv"),
        "folds": len(results),
        "vote": vote,
        "average_f1": summary.average_f1.mean,
        "uar": summary.uar.pooled,
        "uar_interval": [interval.low, interval.high] if interval else None,
        "accuracy": summary.accuracy.pooled,
    }


def _rounding_loss(model: "Model", path: Path, frames: "Frames", corpus: "Corpus", hop: int) -> str:
    """What storing the parameters as float16 changes, measured on all utterances of the corpus."""
    import numpy as np

    from npser.features import WindowSet
    from npser.models import load_model
    from npser.trainer import evaluate

    assert model.scale is not None
    windows = WindowSet(frames, model.scale, model.input_frames, hop)
    exact = evaluate(model, windows).probabilities
    rounded = evaluate(load_model(path, model.backend), windows).probabilities
    right = [100 * float((p.argmax(axis=1) == corpus.targets).mean()) for p in (exact, rounded)]
    changed = int((exact.argmax(axis=1) != rounded.argmax(axis=1)).sum())
    return (
        f"float16: {path.stat().st_size / 1e6:.2f} MB; another label than with float32 for {changed} of "
        f"{count(len(frames), 'training utterances')} ({right[0]:.2f} % right with float32, {right[1]:.2f} % with "
        f"float16), and no probability changes by more than {np.abs(exact - rounded).max():.1e}"
    )


if __name__ == "__main__":
    run("npser.train", main)
