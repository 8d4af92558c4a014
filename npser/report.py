"""The command that reports: one run (`npser.runreport`), or several side by side (`npser.comparison`).

python -m npser.report FOLDER...
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from npser.analysis import listeners
from npser.cli import Parser, count, run
from npser.corpus import user_cache
from npser.errors import UserError
from npser.foldresult import FoldResult
from npser.packed import Run, open_run
from npser.runfolder import MAY_CHANGE
from npser.runreport import report


def merged(folders: Sequence[Run]) -> list[tuple[Run, list[FoldResult]]]:
    """The runs in these folders: folders of the same configuration are one run, computed on several machines.

    Some may have been begun with fewer repeats. But where they decided otherwise on a fold that both have, as another
    backend may, they are two runs.
    """
    runs: list[tuple[str, Run, dict[tuple[int, int], FoldResult]]] = []
    for folder in folders:
        own = {k: v for k, v in folder.config.items() if k not in (*MAY_CHANGE, "repeats")}
        key = json.dumps(own, sort_keys=True)
        made = {(result.repeat, result.fold): result for result in folder.load_folds()}
        for n, (other, first, results) in enumerate(runs):
            common = made.keys() & results.keys()
            if other == key and all(made[fold].confusion == results[fold].confusion for fold in common):
                results.update({fold: result for fold, result in made.items() if fold not in common})
                if folder.config.get("repeats", 0) > first.config.get("repeats", 0):
                    runs[n] = other, folder, results
                break
        else:
            runs.append((key, folder, made))
    return [(folder, list(results.values())) for _, folder, results in runs]


def find_listeners(named: Path | None) -> dict[str, float]:
    """What erkennung.txt says, the one named or the one beside EMO-DB on this machine; empty where there is none."""
    if named:
        return listeners(named)
    data = os.environ.get("NPSER_DATA")
    if data and (beside := Path(data) / "emodb" / "erkennung.txt").is_file():
        return listeners(beside)
    try:
        beside = user_cache() / "emodb" / "erkennung.txt"
    except UserError:  # a user without a home has no cache
        return {}
    return listeners(beside) if beside.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m npser.report`; returns the exit status."""
    parser = Parser(
        prog="python -m npser.report",
        description="Print the report of a run: precision, recall and F1 of each emotion as in the paper's table "
        "(means of the per-fold figures) with the pooled figures beside them, average F1 with its spread over repeats "
        "and over folds, UAR with its confidence interval over speakers, confusion matrices, the utterances most often "
        "confused, learning curves, and every fold. Unfinished runs are reported as far as they are done. Several "
        "runs are set side by side with a paired test; folders that hold parts of one run (--only on several machines) "
        "are put together first.",
        epilog="Exit status: 0 ok, 2 a folder cannot be reported. Examples:\n"
        "  python -m npser.report runs/cnn-emodb-s0 --plots\n"
        "  python -m npser.report runs/cnn-emodb-s0 runs/lstm-emodb-s0",
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="+",
        type=Path,
        help="a run folder, --out of npser.train, or a run packed into one file by python -m bench.publish",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of plain text")
    parser.add_argument(
        "--plots",
        action="store_true",
        help="draw confusion matrix, learning curves, classes and speakers as PNG and SVG, and one page report.html "
        "with everything in it (needs matplotlib: pip install 'npser[plot]')",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the plots go (default: plots/ in the run folder, ./plots for a run in one file, ./comparison for "
        "several runs)",
    )
    parser.add_argument(
        "--listeners",
        type=Path,
        metavar="FILE",
        help="erkennung.txt of EMO-DB, how well human listeners recognised each recording (default: the one in "
        "$NPSER_DATA/emodb or in the user's cache folder, for runs on EMO-DB)",
    )
    options = parser.parse_args(arguments)
    if options.out and not options.plots:
        raise UserError("--out: says where the plots go: add --plots")
    status, folders = 0, []
    for path in options.folders:
        try:
            folder = open_run(path)
            folder.load_folds()
            folders.append(folder)
        except UserError as error:
            print(f"npser.report: {error}", file=sys.stderr)
            status = 2
    if not folders:
        return status
    runs = merged(folders)
    if len(runs) < len(folders):
        print(
            f"npser.report: {count(len(folders), 'folders')} of {count(len(runs), 'runs')}: those with the same "
            "settings are put together",
            file=sys.stderr,
        )
    if options.listeners and len(runs) > 1:
        raise UserError("--listeners: several runs are compared without the utterances confused: leave it away")
    if len(runs) > 1:
        from npser.comparison import compare

        document = compare([(folder.path, folder.config, results) for folder, results in runs])
    else:
        config, results = runs[0][0].config, runs[0][1]
        asked = options.listeners or config.get("corpus") == "emodb"
        document = report(config, results, find_listeners(options.listeners) if asked else {})
    if options.plots:  # first, because it can fail
        from npser.plots import draw_comparison, draw_run

        if len(runs) > 1:
            target = options.out or Path("comparison")
            draw_comparison([(folder.path, folder.config, results) for folder, results in runs], document, target)
        else:
            path = runs[0][0].path
            target = options.out or (path / "plots" if path.is_dir() else Path("plots"))
            draw_run(runs[0][0].config, runs[0][1], document, target)
    print(document.markdown() if options.markdown else document.text(), end="")
    if options.plots:
        print(f"npser.report: drawn in {target}: report.html, and each figure as .png and .svg", file=sys.stderr)
    return status


if __name__ == "__main__":
    run("npser.report", main)
