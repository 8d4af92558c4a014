"""python -m bench.again: a published fold computed again, and what came out beside what is published.

    python -m bench.again                                                    a fold drawn at random from all that ship
    python -m bench.again bench/results/runs/lstm-emodb-s0.json.xz           one of this run's
    python -m bench.again bench/results/runs/lstm-emodb-s0.json.xz --fold 0.8

The fold is computed by the command that the README gives for its run, with --only; its folder starts from the published
config.json, so that npser.train refuses other settings and other data. On the same kind of machine with the same
versions of the packages, every digit should come out again. A processor of another kind may round otherwise, and some
utterances are decided otherwise then. Exit status 0 where all decisions are the published ones, 1 where not.
"""

import argparse
import random
import shlex
from collections.abc import Sequence
from pathlib import Path

from bench.publish import RUNS, beyond_options, command_of
from npser import train
from npser.cli import Parser, run
from npser.document import Table, text_table
from npser.errors import UserError
from npser.foldresult import FoldResult
from npser.metrics import average_f1
from npser.options import repeat_and_fold
from npser.packed import SUFFIX, PackedRun, as_packed, unpack
from npser.runfolder import MAY_CHANGE, RunFolder
from npser.runreport import percent


def draw(files: Sequence[Path], fold: tuple[int, int] | None) -> tuple[PackedRun, FoldResult]:
    """A run and its fold: one of all that a command can compute, each as likely as any other, or the one named."""
    runs = [packed for packed in map(unpack, files) if not packed.config.get("experiment")]
    changed = {packed.path: ", ".join(beyond_options(packed.config)) for packed in runs}
    if len(runs) == 1 and (fields := changed[runs[0].path]):
        raise UserError(f"{runs[0].path}: was made with another {fields} than its recipe has now: no command makes it")
    found = [(packed, result) for packed in runs if not changed[packed.path] for result in packed.folds]
    if fold is not None:
        found = [(packed, result) for packed, result in found if (result.repeat, result.fold) == fold]
    if not found:
        wanted = "of npser.train" if fold is None else f"{fold[0]}.{fold[1]}"
        raise UserError(f"{', '.join(map(str, files)) or RUNS}: no finished fold {wanted} is published there")
    return random.SystemRandom().choice(found)


def _facts(result: FoldResult, vote: str) -> dict[str, str]:
    """What is shown of a fold, by name."""
    versions = result.run.get("versions") or {}
    return {
        **{name: str(versions.get(name)) for name in ("commit", "python", "numpy", "numba")},
        **{name: str(result.run.get(name)) for name in ("machine", "threads")},
        "training loss, last epoch": f"{result.epochs[-1].loss:.6g}",
        "average F1": percent(average_f1(result.matrix(vote))),
        "decisions": str(len(result.utterances)),
        "probabilities": "",
    }


def differences(published: FoldResult, again: FoldResult, vote: str) -> tuple[Table, int]:
    """The two folds side by side, and how many utterances were decided otherwise."""
    theirs, ours = ({u.file: u for u in result.utterances} for result in (published, again))
    otherwise = [f for f, u in theirs.items() if u.by_vote(vote, again.labels) != ours[f].by_vote(vote, again.labels)]
    probabilities = (
        abs(p - q) for f, u in theirs.items() for p, q in zip(u.probabilities, ours[f].probabilities, strict=True)
    )
    losses = (abs(a.loss - b.loss) for a, b in zip(published.epochs, again.epochs, strict=True))
    difference = {
        "training loss, last epoch": f"{max(losses, default=0.0):.2g} at most, of all epochs",
        "decisions": f"{len(otherwise)} otherwise",
        "probabilities": f"{max(probabilities, default=0.0):.2g} at most",
    }
    facts = [_facts(result, vote) for result in (published, again)]
    rows = [(name, *(shown[name] for shown in facts), difference.get(name, "")) for name in facts[0]]
    title = f"Fold {published.repeat}.{published.fold}, published and computed again"
    return Table(title, ("", "published", "again", "difference"), tuple(rows), left=3), len(otherwise)


def main(arguments: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m bench.again", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", type=Path, help="a published run (default: drawn from all)")
    p.add_argument(
        "--fold", type=repeat_and_fold, metavar="R.F", help="repeat and fold (default: drawn from the run's)"
    )
    p.add_argument("--data", help="where the corpus is (default: the name it was published under: emodb, demo)")
    p.add_argument("--out", type=Path, help="run folder (default: runs/again-<run>); an interrupted fold goes on there")
    options = p.parse_args(arguments)
    packed, published = draw([options.run] if options.run else sorted(RUNS.glob(f"*{SUFFIX}")), options.fold)
    name = packed.path.name.removesuffix(SUFFIX)
    fold = f"{published.repeat}.{published.fold}"
    out = options.out or Path(f"runs/again-{name}")
    print(f"fold {fold} of {packed.path}; to go on after an interruption:")
    given = [f"--{word}={value}" for word, value in (("data", options.data), ("out", options.out)) if value]
    print(f"    python -m bench.again {shlex.join([str(packed.path), '--fold', fold, *given])}\n")
    one = published.repeat, published.fold
    RunFolder.open_or_create(out, packed.config, (*MAY_CHANGE, "repeats"), one)  # not kept: unlocked
    if one in RunFolder.open(out).finished():  # it would be shown, and not computed
        raise UserError(f"--out {out}: fold {fold} was computed there before: name another folder")
    words = shlex.split(command_of(packed.config))[3:]
    words += ["--data", options.data] if options.data else []
    train.main([*words, "--only", fold, "--out", str(out)])
    again = as_packed(RunFolder.open(out).load_fold(published.repeat, published.fold))
    table, otherwise = differences(published, again, packed.config["vote"])
    print(f"\n{text_table(table)}")
    return 1 if otherwise else 0


if __name__ == "__main__":
    run("bench.again", main)
