"""The options of npser.train: what they are called, what they default to, and which exclude each other."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from npser.cli import Parser, whole
from npser.errors import UserError
from npser.recipes import ARCHITECTURES, DEMO, NAMES, RECIPES


def repeat_and_fold(text: str) -> tuple[int, int]:
    """An argparse type: R.F, repeat and fold counted from 0."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form R.F, for instance 0.3: repeat 0, fold 3")
    return int(match[1]), int(match[2])


def _place(text: str) -> Path:
    """An argparse type: a path, not an empty one, which would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name a place")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m npser.train",
        description="Train one of the three networks of Lim, Jang and Lee (APSIPA 2016) to recognise emotions in "
        "speech, and test it by cross-validation on recordings it has not heard. Prints the paper's table: precision, "
        "recall and F1 of each emotion.",
        epilog="Run the same command again to go on after an interruption: finished folds are kept, the fold at work "
        "goes on from its last finished epoch. Exit status: 0 done, 1 the run failed (training diverged, disk full), "
        "2 wrong use or bad input, 130 interrupted. Examples, the paper's experiment and a model for npser.predict:\n"
        "  python -m npser.train --arch cnn --data emodb\n"
        "  python -m npser.train --arch cnn --data emodb --cv none --save model.npz",
    )
    what = p.add_argument_group("what is trained, and on what")
    what.add_argument(
        "--arch",
        required=True,
        choices=ARCHITECTURES,
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
        "path,emotion[,speaker][,text][,split]; python -m npser.corpus PATH shows what it is taken for (default: demo)",
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
    protocol.add_argument(
        "--repeats", type=whole(1, 1000), metavar="N", help="repeats of all folds (default: 5, demo 1)"
    )
    protocol.add_argument(
        "--recipe",
        default="paper",
        choices=NAMES,
        help="what the paper leaves open: paper, what its words support (and for the lstm a limit on the gradient); "
        "best, the same networks with what development trials showed to be worth having (the tdcnn's is the cnn's, not "
        "tried); README, Our choices (default: paper)",
    )
    protocol.add_argument("--epochs", type=whole(1), metavar="N", help=_default("epochs"))
    protocol.add_argument(
        "--batch-size", type=whole(1), metavar="N", help="windows in an update (default: 32, demo 16)"
    )
    protocol.add_argument(
        "--segment-hop",
        type=whole(1),
        metavar="N",
        help=f"frames (8 ms) between the windows of an utterance; {_default('segment_hop')}",
    )
    protocol.add_argument(
        "--share-windows",
        type=whole(1),
        metavar="N",
        help="tdcnn: let N neighbouring samples of an utterance stand together in a batch, and compute the windows "
        "that they have in common once, with one dropout mask; faster where the segment hop is a multiple of 8 below "
        "32, but samples of a batch are then less diverse (default: 1, no sharing)",
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
        type=_place,
        metavar="FOLDER",
        help="run folder, resumed if there (default: runs/<arch>-<corpus>-s<seed>; <corpus>-best with --recipe best; "
        "with --cv none -all at its end)",
    )
    how.add_argument("--save", type=_place, metavar="MODEL.npz", help="with --cv none: where to save the model")
    how.add_argument(
        "--storage",
        default="float32",
        choices=("float32", "float16"),
        help="with --cv none: how the model's parameters are stored; float16 makes half of the file (of tdcnn's 587 "
        "MB), and what that changes in its decisions is measured and printed (default: float32)",
    )
    how.add_argument(
        "--score-from",
        type=Path,
        metavar="FOLDER",
        help="with --cv none: the run folder of a cross-validation with the same settings, or that run packed into one "
        "file, whose score the model file then carries",
    )
    how.add_argument(
        "--checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="save the state after every epoch, to go on from; 1.2 GB for tdcnn (default: yes)",
    )
    return p


def _default(field: str) -> str:
    """The default of a recipe's field, for --help."""
    values = []
    for arch, plain in RECIPES["paper"].items():
        numbers = [getattr(recipe[arch], field) for recipe in RECIPES.values()]
        best = f", best {numbers[1]}" if numbers[1] != numbers[0] else ""
        values.append(f"{arch} {getattr(plain, field)}{best} (demo {DEMO[arch][field]})")
    return "default: " + ", ".join(values)


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options given. UserError where they contradict each other."""
    options = parser().parse_args(arguments)
    for name, given in (("--data", options.data), ("--test-data", options.test_data)):
        if given is not None and not given.strip():
            raise UserError(f"{name}: is empty: name a corpus")
    if (options.share_windows or 1) > 1 and options.arch != "tdcnn":
        raise UserError(
            f"--share-windows {options.share_windows}: a sample of {options.arch} has one window: leave it out"
        )
    if (options.share_windows or 1) > 1 and RECIPES[options.recipe][options.arch].moving:
        raise UserError(
            f"--share-windows {options.share_windows}: windows move in --recipe {options.recipe}, and have nothing in "
            "common: leave one of the two out"
        )
    if options.save and options.cv != "none":
        raise UserError("--save: a cross-validation has no single model to save: add --cv none")
    for name, given in (("--score-from", options.score_from), ("--storage float16", options.storage == "float16")):
        if given and options.cv != "none":
            raise UserError(f"{name}: a cross-validation has no single model to save: add --cv none")
    if options.cv == "none" and options.vote != "sum":
        raise UserError(
            f"--vote {options.vote}: what --cv none saves decides by sum, as npser.predict does: leave it away"
        )
    for name in ("only", "folds", "repeats"):
        if options.cv == "none" and getattr(options, name):
            raise UserError(f"--{name}: there are no folds with --cv none")
    if options.test_data and options.cv not in (None, "split"):
        raise UserError(f"--test-data: what is tested on is given, so --cv {options.cv} cannot be: leave it away")
    options.cv = options.cv or ("split" if options.test_data else "stratified")
    if (options.workers > 1 or options.dask) and options.cv == "none":
        raise UserError(f"{'--dask' if options.dask else '--workers'}: there are no folds with --cv none")
    if options.dask is not None and not options.dask.strip():
        raise UserError("--dask: no address given; tcp://host:8786 for one")
    if options.workers > 1 and options.dask:
        raise UserError("--workers: the scheduler of --dask knows its workers: leave --workers away")
    return options
