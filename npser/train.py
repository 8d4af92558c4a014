"""python -m npser.train: cross-validated training of the paper's networks.

Only the options are read here at first: NumPy and Numba are imported when they prove valid, after the number of
threads is known, so that `--help` answers at once.
"""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npser.cli import Parser, computing, machine, run, set_threads, versions, whole
from npser.errors import RunFailed, UserError

if TYPE_CHECKING:
    from npser.corpus import Corpus
    from npser.crossval import Fold, Frames, Settings
    from npser.models import Model
    from npser.progress import Progress
    from npser.runfolder import RunFolder

# Chosen on development data out of the training folds, never on a test fold: see "Our choices" in the README.
EPOCHS = {"cnn": 6, "lstm": 10, "tdcnn": 4}
SEGMENT_HOP = {"cnn": 16, "lstm": 16, "tdcnn": 16}
BATCH_SIZE = 32
CLIP_NORM = {"cnn": None, "lstm": 1.0, "tdcnn": None}
# The built-in corpus is there to be run at once: a short protocol with the same networks.
DEMO_EPOCHS = {"cnn": 4, "lstm": 10, "tdcnn": 3}
DEMO_SEGMENT_HOP = {"cnn": 16, "lstm": 16, "tdcnn": 28}
DEMO_BATCH_SIZE = 16
DEMO_FOLDS, DEMO_REPEATS = 2, 1


def repeat_and_fold(text: str) -> tuple[int, int]:
    """An argparse type: R.F, repeat and fold counted from 0."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form R.F, for instance 0.3: repeat 0, fold 3")
    return int(match[1]), int(match[2])


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m npser.train",
        description="Train one of the three networks of Lim, Jang and Lee (APSIPA 2016) to recognise emotions in "
        "speech, and test it by cross-validation on recordings it has not heard. Prints the paper's table: precision, "
        "recall and F1 of each emotion.",
        epilog="Run the same command again to go on after an interruption: finished folds are kept, the fold at work "
        "goes on from its last finished epoch. Exit status: 0 done, 1 the run failed (training diverged, disk full), "
        "2 wrong use or bad input, 130 interrupted. Example, the paper's experiment: "
        "python -m npser.train --arch cnn --data emodb",
    )
    what = p.add_argument_group("what is trained, and on what")
    what.add_argument(
        "--arch",
        required=True,
        choices=("cnn", "lstm", "tdcnn"),
        help="cnn: two convolution blocks and a dense layer on windows of 128 frames (1 s); lstm: three LSTM layers "
        "over the same frames; tdcnn: four overlapping windows through the convolution blocks, then two LSTM layers",
    )
    what.add_argument(
        "--data",
        default="demo",
        metavar="demo|emodb|PATH",
        help="demo: the built-in generated corpus; emodb: the corpus at $NPSER_DATA/emodb, else fetched from its "
        "authors into the user's cache folder; PATH: a folder, searched for audio, the emotion told by the file names "
        "of a known corpus, else by the folder that a file lies in, or a .csv file with the columns "
        "path,speaker,emotion[,split]; python -m npser.corpus PATH shows what it is taken for (default: demo)",
    )
    what.add_argument(
        "--test-data",
        metavar="emodb|PATH",
        help="train on all of --data and test on all of this corpus, over the emotions that they share",
    )
    protocol = p.add_argument_group("protocol")
    protocol.add_argument(
        "--cv",
        choices=("stratified", "speaker", "split", "none"),
        help="stratified: every fold has its share of each emotion; speaker: leave one speaker out; split: train and "
        "test as the .csv file's column split says; none: fit one model on everything and save it (default: "
        "stratified, with --test-data split)",
    )
    protocol.add_argument("--folds", type=whole(2), metavar="N", help="test folds (default: 10, demo 2)")
    protocol.add_argument("--repeats", type=whole(1), metavar="N", help="repeats of all folds (default: 5, demo 1)")
    protocol.add_argument("--epochs", type=whole(1), metavar="N", help=f"{_by_arch(EPOCHS, DEMO_EPOCHS)}")
    protocol.add_argument(
        "--batch-size", type=whole(1), metavar="N", help="windows in an update (default: 32, demo 16)"
    )
    protocol.add_argument(
        "--segment-hop",
        type=whole(1),
        metavar="N",
        help=f"frames (8 ms) between the windows of an utterance; {_by_arch(SEGMENT_HOP, DEMO_SEGMENT_HOP)}",
    )
    protocol.add_argument(
        "--vote",
        default="sum",
        choices=("sum", "majority"),
        help="how an utterance's windows decide: sum of their probabilities, or majority; both are recorded "
        "(default: sum)",
    )
    protocol.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="of folds, weights, order, dropout (default: 0)"
    )
    protocol.add_argument(
        "--only", type=repeat_and_fold, metavar="R.F", help="run just repeat R, fold F, counted from 0"
    )
    how = p.add_argument_group("how it is computed, and where results go")
    how.add_argument(
        "--backend",
        default="cpu",
        choices=("cpu", "reference", "cuda"),
        help="cpu: compiled kernels; cuda: an NVIDIA GPU; reference: plain NumPy, to check by, many times slower "
        "(default: cpu)",
    )
    how.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "tf32"),
        help="of large matrix products with --backend cuda; tf32: on the tensor cores, with 10 instead of 23 bits of "
        "mantissa (default: float32)",
    )
    how.add_argument("--threads", type=whole(1), metavar="N", help="processor cores to use (default: all)")
    how.add_argument(
        "--workers",
        type=whole(1),
        default=1,
        metavar="N",
        help="folds that are computed side by side, in processes that share the threads; each needs the memory of a "
        "whole training (default: 1)",
    )
    how.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="give the folds to the workers of this dask.distributed scheduler, tcp://host:8786 for one, which were "
        "started with --nthreads 1 and find --data under the same name; --threads is for each of them (needs "
        "pip install 'npser[dask]')",
    )
    how.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="run folder (default: runs/<arch>-<corpus>-s<seed>), resumed if there",
    )
    how.add_argument("--save", type=Path, metavar="MODEL.npz", help="with --cv none: where to save the model")
    how.add_argument(
        "--storage",
        default="float32",
        choices=("float32", "float16"),
        help="with --cv none: how the model's parameters are stored; float16 halves the file (tdcnn: 587 MB), and what "
        "that changes in its decisions is measured and printed (default: float32)",
    )
    how.add_argument(
        "--score-from",
        type=Path,
        metavar="FOLDER",
        help="with --cv none: the run folder of a cross-validation with the same settings, whose score the model file "
        "then carries",
    )
    how.add_argument(
        "--checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="save the state after every epoch, to go on from; 1.2 GB for tdcnn (default: yes)",
    )
    return p


def _by_arch(usual: dict[str, int], demo: dict[str, int]) -> str:
    return "default: " + ", ".join(f"{arch} {usual[arch]} (demo {demo[arch]})" for arch in usual)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, raises UserError or RunFailed."""
    options = parser().parse_args(arguments)
    if options.precision != "float32" and options.backend != "cuda":
        raise UserError(f"--precision {options.precision}: the {options.backend} has float32 only: add --backend cuda")
    if options.save and options.cv != "none":
        raise UserError("--save: a cross-validation has no single model to save: add --cv none")
    for name, given in (("--score-from", options.score_from), ("--storage float16", options.storage == "float16")):
        if given and options.cv != "none":
            raise UserError(f"{name}: a cross-validation has no single model to save: add --cv none")
    if options.only and options.cv == "none":
        raise UserError("--only: there are no folds with --cv none")
    if options.test_data and options.cv not in (None, "split"):
        raise UserError(f"--test-data: what is tested on is given, so --cv {options.cv} cannot be: leave it away")
    options.cv = options.cv or ("split" if options.test_data else "stratified")
    if (options.workers > 1 or options.dask) and options.cv == "none":
        raise UserError(f"{'--dask' if options.dask else '--workers'}: there are no folds with --cv none")
    if options.workers > 1 and options.dask:
        raise UserError("--workers: the scheduler of --dask knows its workers: leave --workers away")
    threads = set_threads(options.threads, options.backend)
    if options.workers > threads:
        raise UserError(f"--workers {options.workers}: they share {threads} threads: use at most so many")
    threads //= options.workers

    from npser.corpus import cross_corpus, open_corpus

    with computing(options.backend, options.precision):
        corpus = open_corpus(options.data)
        if options.test_data:
            corpus = cross_corpus(corpus, open_corpus(options.test_data))
        demo = corpus.name == "demo"
        config = _config(options, corpus, threads, demo)
        if options.cv == "none":
            return _fit_everything(options, corpus, config)
        return _cross_validate(options, corpus, config)


def _config(options: argparse.Namespace, corpus: "Corpus", threads: int, demo: bool) -> dict[str, Any]:
    """Everything needed to repeat the run, as config.json holds it."""
    from npser import features
    from npser.optim import SGD

    arch = options.arch
    sgd = SGD(clip_norm=CLIP_NORM[arch])
    folds = len(corpus.speakers) if options.cv == "speaker" else options.folds or (DEMO_FOLDS if demo else 10)
    if options.cv == "speaker" and options.folds not in (None, folds):
        raise UserError(f"--folds {options.folds}: --cv speaker makes one fold for each of the {folds} speakers")
    if options.cv == "split":
        folds = 1
        if options.folds not in (None, 1):
            raise UserError(f"--folds {options.folds}: a given split of training and test makes one fold")
    return {
        "arch": arch,
        "corpus": corpus.name,
        "utterances": len(corpus.utterances),
        "utterances_sha256": listing_sha256(corpus),
        "labels": list(corpus.labels),
        "cv": options.cv,
        "folds": folds,
        "repeats": options.repeats or (DEMO_REPEATS if demo else 5),
        "epochs": options.epochs or (DEMO_EPOCHS if demo else EPOCHS)[arch],
        "batch_size": options.batch_size or (DEMO_BATCH_SIZE if demo else BATCH_SIZE),
        "segment_hop": options.segment_hop or (DEMO_SEGMENT_HOP if demo else SEGMENT_HOP)[arch],
        "vote": options.vote,
        "seed": options.seed,
        "optimiser": {"lr": sgd.lr, "momentum": sgd.momentum, "decay": sgd.decay, "clip_norm": sgd.clip_norm},
        "features": {"frame": features.FRAME, "hop": features.HOP, "bins": features.BINS, "floor": features.FLOOR},
        "backend": options.backend,
        "precision": options.precision,
        "threads": threads,
        "versions": versions(),
    }


def listing_sha256(corpus: "Corpus") -> str:
    """Of which utterances a run is made."""
    listing = "\n".join(f"{u.name}\t{u.speaker}\t{u.emotion}" for u in corpus.utterances)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def settings_of(config: Mapping[str, Any]) -> "Settings":
    """The part of a configuration that decides the numbers."""
    from npser.crossval import Settings

    names = ("arch", "backend", "seed", "epochs", "batch_size", "segment_hop", "vote")
    return Settings(**{name: config[name] for name in names}, clip_norm=config["optimiser"]["clip_norm"])


def _introduce(config: dict[str, Any], corpus: "Corpus", frames: "Frames", plan: str) -> None:
    """The first lines: what will be run, and on what."""
    from npser.audio import SAMPLE_RATE
    from npser.features import HOP
    from npser.models import parameter_count

    seconds = sum(map(len, frames)) * HOP / SAMPLE_RATE
    parameters = parameter_count(config["arch"], len(corpus.labels))
    source = "the built-in, generated demonstration corpus" if corpus.name == "demo" else f"corpus {corpus.name}"
    known = [s for s in corpus.speakers if s]
    by = f" by {len(known)} speakers" if known else ""
    print(
        f"{config['arch']} on {source}: {len(corpus.utterances)} utterances{by}, {len(corpus.labels)} emotions, "
        f"{seconds / 60:.1f} min of speech"
    )
    print(
        f"{parameters / 1e6:.3f} million parameters, backend {_backend(config)}, {config['threads']} threads, "
        f"seed {config['seed']}"
    )
    print(plan, flush=True)
    for line in corpus.skipped[:10]:
        print(f"skipped {line}", file=sys.stderr)
    if len(corpus.skipped) > 10:
        print(f"skipped {len(corpus.skipped) - 10} more files", file=sys.stderr)
    if corpus.skipped:
        print(f"skipped {len(corpus.skipped)} files in all", file=sys.stderr, flush=True)


def _backend(config: Mapping[str, Any]) -> str:
    """What computes, for people: the GPU by its name."""
    if config["backend"] != "cuda":
        return str(config["backend"])
    from kernels.cuda import device_name

    return f"cuda ({device_name()}, {config['precision']})"


def machine_of(config: Mapping[str, Any]) -> str:
    """What computes, for the record."""
    return machine() + (f", {_backend(config)}" if config["backend"] == "cuda" else "")


def _warn_of_compilation(backend: str, progress: "Progress") -> None:
    if backend == "cuda":
        progress.say("compiling kernels for the GPU (at every start) ...")
    if backend == "cpu":
        from kernels.cpu import cache_is_cold

        if cache_is_cold():
            progress.say("compiling kernels (once; they are kept for the next start) ...")


def _cross_validate(options: argparse.Namespace, corpus: "Corpus", config: dict[str, Any]) -> int:
    from npser.crossval import make_folds, run_fold, training_steps
    from npser.frontend import read_frames
    from npser.models import input_frames
    from npser.progress import Progress
    from npser.report import render_text

    folds = make_folds(corpus, config["cv"], config["folds"], config["repeats"], config["seed"])
    folder = _open_folder(options, config)
    chosen = [fold for fold in folds if options.only in (None, (fold.repeat, fold.number))]
    if not chosen:
        raise UserError(
            f"--only {options.only[0]}.{options.only[1]}: there are repeats 0 to {config['repeats'] - 1} "
            f"and folds 0 to {config['folds'] - 1}"
        )
    frames = read_frames(corpus, config["backend"], config["threads"])
    settings = settings_of(config)
    length = input_frames(config["arch"])
    finished = set(folder.finished())
    waiting = [fold for fold in chosen if (fold.repeat, fold.number) not in finished]
    steps = {f.name: training_steps(frames, corpus.targets, f.train, length, settings) for f in waiting}
    total = sum(steps.values())
    _introduce(config, corpus, frames, _plan(config, options, len(chosen), len(waiting), total, folder))
    progress = Progress(total)
    if waiting:
        _warn_of_compilation(config["backend"], progress)
    about = {key: config[key] for key in ("backend", "precision", "threads", "vote", "versions")}
    about["machine"] = machine_of(config)
    if options.dask or (options.workers > 1 and len(waiting) > 1):
        _in_processes(options, folder, waiting, about | {"workers": options.dask or options.workers})
    else:
        for fold in waiting:
            progress.begin_fold(f"fold {fold.name}", steps[fold.name])
            run_fold(corpus, frames, fold, settings, folder, progress, options.checkpoint, about)
    if not waiting:
        folder.write_tables()  # the vote may have changed
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
        )
        for fold in waiting
    ]
    if options.dask:
        run_on_dask(jobs, folder, options.dask)
    else:
        run_locally(jobs, folder, options.workers)


def _open_folder(options: argparse.Namespace, config: dict[str, Any]) -> "RunFolder":
    from npser.runfolder import MAY_CHANGE, RunFolder

    out = options.out or Path("runs") / f"{config['arch']}-{config['corpus']}-s{config['seed']}"
    return RunFolder.open_or_create(out, config, MAY_CHANGE)


def _plan(
    config: dict[str, Any], options: argparse.Namespace, chosen: int, waiting: int, steps: int, folder: "RunFolder"
) -> str:
    kinds = {"stratified": "stratified folds", "speaker": "folds, one for each speaker"}
    kinds["split"] = "fold, training and test as given,"
    lines = [
        f"{config['folds']} {kinds[config['cv']]} x {config['repeats']} repeat{'s' * (config['repeats'] > 1)}, "
        f"{config['epochs']} epochs of windows {config['segment_hop']} frames apart, batches of {config['batch_size']}"
    ]
    if options.only:
        lines.append(f"only repeat {options.only[0]}, fold {options.only[1]}")
    if waiting < chosen:
        lines.append(f"{chosen - waiting} of {chosen} folds are finished already")
    if waiting:
        lines.append(f"{steps} updates to do; results go to {folder.path}")
    return "; ".join(lines)


def _fit_everything(options: argparse.Namespace, corpus: "Corpus", config: dict[str, Any]) -> int:
    """--cv none: one model on all utterances, saved."""
    import numpy as np

    from npser.crossval import train_on, training_steps
    from npser.frontend import read_frames
    from npser.modelfile import score_of
    from npser.models import input_frames
    from npser.progress import Progress
    from npser.trainer import Checkpoint

    score = _measured_score(options.score_from, config) if options.score_from else None
    config |= {"folds": 0, "repeats": 1}
    folder = _open_folder(options, config)
    path = options.save or folder.path / "model.npz"
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--save {path}: the folder {path.parent} is not there or cannot be written to")
    frames = read_frames(corpus, config["backend"], config["threads"])
    settings = settings_of(config)
    everything = np.arange(len(frames))
    total = training_steps(frames, corpus.targets, everything, input_frames(config["arch"]), settings)
    plan = (
        f"one model on everything, {config['epochs']} epochs of windows {config['segment_hop']} frames apart, "
        f"batches of {config['batch_size']}; {total} updates to do; the model goes to {path}"
    )
    _introduce(config, corpus, frames, plan)
    progress = Progress(total)
    _warn_of_compilation(config["backend"], progress)
    progress.begin_fold("all data", total)
    words = (config["seed"], 0, 0)
    checkpoint_path = folder.checkpoint_path(0, 0)
    checkpoint = Checkpoint(checkpoint_path, f"{config['arch']} {words}", progress) if options.checkpoint else None
    model, epochs = train_on(
        frames, corpus.targets, everything, len(corpus.labels), settings, words, progress, checkpoint
    )
    model.labels, model.training = corpus.labels, {**config, "machine": machine_of(config)}
    model.cross_validation = score
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
        print(_rounding_loss(model, path, frames, corpus, settings.segment_hop))
    return 0


def _measured_score(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The figures of a cross-validation for the model file; UserError unless it is of the same settings and data."""
    from npser.analysis import speaker_matrices, uar_interval
    from npser.comparison import summary_of
    from npser.runfolder import RunFolder

    folder = RunFolder.open(run)
    same = ("arch", "utterances_sha256", "labels", "epochs", "batch_size", "segment_hop", "optimiser", "features")
    differing = [key for key in same if folder.config.get(key) != config[key]]
    if differing:
        raise UserError(f"--score-from {run}: another training, its {', '.join(differing)} are not those of this one")
    results = folder.load_folds()
    if not results:
        raise UserError(f"--score-from {run}: no fold is finished there")
    summary = summary_of((run, folder.config, results))
    interval = uar_interval(speaker_matrices(results, folder.config["vote"]))
    return {
        "cv": folder.config.get("cv"),
        "folds": len(results),
        "vote": folder.config["vote"],
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
        f"float16: {path.stat().st_size / 1e6:.2f} MB; of {len(frames)} training utterances {changed} get another "
        f"label than with float32 ({right[0]:.2f} % right with float32, {right[1]:.2f} % with float16), and no "
        f"probability changes by more than {np.abs(exact - rounded).max():.1e}"
    )


if __name__ == "__main__":
    run("npser.train", main)
