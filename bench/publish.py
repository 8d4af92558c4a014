"""python -m bench.publish: finished folds into files that ship, and every table of the README's Results out of them.

    python -m bench.publish runs/cnn-emodb-s0        pack what is done, draw its pictures, write the README's tables
    python -m bench.publish                          write the README's tables anew from the files that ship
    python -m bench.publish --unpack FILE FOLDER     a run folder again, to go on with on another machine

A run becomes bench/results/runs/<name>.json.xz (npser.packed) and may be published again and again while it grows:
folds that the file has are kept as they are. The text between the two markers in README.md is made of these
files alone.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from npser.cli import Parser, count, run
from npser.document import Table, markdown_table
from npser.errors import UserError
from npser.files import write_atomically
from npser.foldresult import FoldResult
from npser.packed import SUFFIX, Run, open_run, pack, unpack
from npser.recipes import ARCHITECTURES, OPTIONS, Recipe, as_settings, recipe_for
from npser.report import merged
from npser.runfolder import MAY_CHANGE, RunFolder
from npser.runreport import class_table, ends, paper_figure, percent, report, summary_of

ROOT = Path(__file__).resolve().parent.parent
README, RUNS, PICTURES = ROOT / "README.md", ROOT / "bench/results/runs", ROOT / "bench/results/pictures"
BEGIN = "<!-- results: written by python -m bench.publish -->"
END = "<!-- end of results -->"
DRAWN = ("confusion", "curves")
# Fields that only another recipe can change.
_WITHOUT_OPTION = {field.name for field in fields(Recipe)} - {*OPTIONS, "share_windows"}

Published = dict[str, tuple[Mapping[str, Any], list[FoldResult]]]  # name -> configuration, folds


# --- files -------------------------------------------------------------------------------------------------------


def unusual(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command, beside its recipe's, in which a run differs from their defaults."""
    demo = config["corpus"] == "demo"
    folds, repeats = (10, 1) if config.get("experiment") else (2, 1) if demo else (10, 5)
    usual = {"folds": folds, "repeats": repeats, "seed": 0, "backend": "cpu", "precision": "float32"}
    if config["cv"] == "speaker":
        usual["folds"] = config["folds"]
    return {name: config[name] for name, value in usual.items() if config.get(name, value) != value}


def off_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """In what a run's training differs from its recipe as that is now."""
    from bench.leakage import EXPERIMENTS, without_augmentation

    recipe = recipe_for(config["recipe"], config["arch"], config["corpus"] == "demo", {})
    if config.get("experiment") in EXPERIMENTS:
        recipe = without_augmentation(recipe)
    now, then = ({**settings, **settings["training"]} for settings in (as_settings(recipe), config))
    del now["training"]
    return {name: then[name] for name, value in now.items() if then[name] != value}


def beyond_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """In what a run's training differs from its recipe as that is now, and no option of a command can say so."""
    return {name: value for name, value in off_recipe(config).items() if name in _WITHOUT_OPTION}


def _spelt(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def name_of(config: Mapping[str, Any]) -> str:
    """What a run is called: cnn-emodb-s0, lstm-emodb-speaker-s0, cnn-emodb-best-epochs4-s0, honest-cnn-emodb-s0."""
    parts = [config.get("experiment"), config["arch"], config["corpus"]]
    parts += [config["cv"] if config["cv"] != "stratified" else None]
    parts += [config["recipe"] if config["recipe"] != "paper" else None]
    others = {name: value for name, value in unusual(config).items() if name not in ("seed", "repeats")}  # may grow
    for name, value in (off_recipe(config) | others).items():
        parts.append(value if name in ("backend", "precision") else f"{name.replace('_', '-')}{_spelt(value)}")
    parts += [f"s{config['seed']}"]
    return "-".join(part for part in parts if part)


def publish(paths: Sequence[Path], runs: Path = RUNS, pictures: Path = PICTURES) -> list[Path]:
    """Pack the runs and draw their pictures; returns the files written."""
    given: list[Run] = [open_run(path) for path in paths]
    for folder in given:
        missing = [key for key in ("arch", "corpus", "cv", "recipe", "seed", "training") if key not in folder.config]
        if missing:
            raise UserError(f"{folder.path}: its config.json does not say {', '.join(missing)}: run it anew")
        if folder.config["cv"] == "split":
            raise UserError(f"{folder.path}: the tables are made of folds: what --cv split made cannot be published")
    names = list(dict.fromkeys(name_of(folder.config) for folder in given))
    written = []
    for name in names:
        target = runs / f"{name}{SUFFIX}"
        own = [folder for folder in given if name_of(folder.config) == name]
        # What is published stays what it is; the folder adds the folds that are new.
        together = merged([*([unpack(target)] if target.exists() else []), *own])
        if len(together) > 1:
            raise UserError(
                f"{target.name}: its settings or its decisions are not those of {own[0].path}: "
                "delete the file to replace it"
            )
        folder, results = together[0]
        if not results:
            raise UserError(f"{folder.path}: no fold is finished yet: nothing to publish")
        for result in results:
            if "-dirty" in (commit := origin(result)[0]):
                raise UserError(
                    f"{own[0].path}: fold {result.repeat}.{result.fold} was computed by a checkout with changes "
                    f"({commit}), which nobody else has: commit them and compute it again"
                )
        runs.mkdir(parents=True, exist_ok=True)
        pack(folder.config, results, target)
        written += [target, *draw(name, folder.config, results, pictures)]
    return written


def draw(name: str, config: Mapping[str, Any], results: Sequence[FoldResult], pictures: Path) -> list[Path]:
    """Confusion matrix and learning curves of an ordinary run, as PNG; experiments have none."""
    from npser.plots import draw_run

    if config.get("experiment"):
        return []
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        draw_run(config, results, report(config, results), Path(scratch))
        drawn = [pictures / f"{name}-{kind}.png" for kind in DRAWN]
        for kind, target in zip(DRAWN, drawn, strict=True):
            write_atomically(target, (Path(scratch) / f"{kind}.png").read_bytes())
    return drawn


def shipped(runs: Path = RUNS) -> Published:
    """All runs that ship, by name. UserError where a file has the name of another run."""
    files = sorted(runs.glob(f"*{SUFFIX}")) if runs.is_dir() else []
    made: Published = {}
    for file in files:
        packed = unpack(file)
        name = file.name.removesuffix(SUFFIX)
        if name != name_of(packed.config):
            raise UserError(
                f"{file}: the run in it is called {name_of(packed.config)}, by its recipe now: rename the file"
            )
        made[name] = packed.config, packed.load_folds()
    return made


# --- tables ------------------------------------------------------------------------------------------------------


def results_text(published: Published) -> str:
    """Everything between the markers."""
    parts = ["No run has been published yet."] if not published else []
    for section in (_protocol, _averaged, _speakers, _order, _leakage, _nested, _provenance):
        parts += section(published)
    return "\n\n".join(parts)


def _ordinary(published: Published, cv: str) -> Published:
    """The runs of npser.train by one kind of cross-validation, in the order of the tables."""
    chosen = {n: r for n, r in published.items() if not r[0].get("experiment") and r[0]["cv"] == cv}

    def place(name: str) -> tuple[Any, ...]:
        config, _ = chosen[name]
        return ARCHITECTURES.index(config["arch"]), config["recipe"] != "paper", bool(off_recipe(config)), name

    return {name: chosen[name] for name in sorted(chosen, key=place)}


def _what(config: Mapping[str, Any]) -> str:
    """A run in words, on EMO-DB unless another corpus is named."""
    others = {k: v for k, v in unusual(config).items() if k not in ("folds", "repeats")}
    changes = [f"{name.replace('_', ' ')} {_spelt(value)}" for name, value in (off_recipe(config) | others).items()]
    corpus = [config["corpus"]] if config["corpus"] != "emodb" else []
    return ", ".join([config["arch"], *corpus, f"{config['recipe']} recipe", *changes])


def _done(config: Mapping[str, Any], results: Sequence[FoldResult]) -> str:
    return f"{len(results)} of {config['folds'] * config['repeats']}"


def _titled(table: Table) -> str:
    return f"#### {table.title}\n\n{markdown_table(table)}"


def _protocol(published: Published) -> list[str]:
    """The paper's experiment, and others of its kind: a line for each run, then each run's classes and pictures."""
    tables: dict[tuple[str, int, int], list[tuple[str, ...]]] = {}
    parts = []
    for name, (config, results) in _ordinary(published, "stratified").items():
        s = summary_of(config, results)
        figures = (s.average_f1.mean, s.average_f1.over_repeats, s.average_f1.over_folds, s.uar.mean, s.accuracy.mean)
        paper = paper_figure(config)
        beside = "{:.2f} (+-{:.2f})".format(*paper) if paper else "-"
        rows = tables.setdefault((config["corpus"], config["folds"], config["repeats"]), [])
        rows.append((_what(config), _done(config, results), *map(percent, figures), beside))
        classes = class_table(s)
        title = f"{_what(config)}: each emotion, in per cent ({name})"
        parts += [_titled(Table(title, classes.header, classes.rows)), _pictures(name)]
    header = ("network", "folds done", "average F1", "+- repeats", "+- folds", "UAR", "accuracy", "F1 in the paper")
    shown = []
    for protocol, rows in tables.items():
        corpus, folds, repeats = protocol
        what = "The paper's experiment" if protocol == ("emodb", 10, 5) else corpus
        title = f"{what}: {count(folds, 'stratified folds')}, {count(repeats, 'repeats')}"
        shown.append(_titled(Table(f"{title}; means of the folds, in per cent", header, tuple(rows))))
    return [*shown, *parts]


def _pictures(name: str) -> str:
    captions = {"confusion": "confusion matrix", "curves": "learning curves"}
    return "\n".join(f"![{captions[kind]} of {name}](bench/results/pictures/{name}-{kind}.png)" for kind in DRAWN)


def _averaged(published: Published) -> list[str]:
    """What the networks of all whole repeats say together, beside one network alone."""
    from npser.analysis import averaged, speaker_matrices, uar_interval, whole_repeats

    rows = []
    for config, results in (_ordinary(published, "stratified") | _ordinary(published, "speaker")).values():
        if (together := averaged(results, config["folds"])) is None:
            continue
        decided, networks = together
        whole = whole_repeats(results, config["folds"])
        alone, s = summary_of(config, [r for r in results if r.repeat in whole]), summary_of(config, decided)
        between = ends(uar_interval(speaker_matrices(decided, config["vote"])))
        figures = (alone.average_f1.mean, s.average_f1.mean, alone.uar.pooled, s.uar.pooled)
        what = _what(config) + (", leave one speaker out" if config["cv"] == "speaker" else "")
        rows.append((what, str(networks), *map(percent, figures), between, percent(s.accuracy.pooled)))
    header = ("network", "networks", "average F1 alone", "together", "pooled UAR alone", "together", "95 % interval")
    if not rows:
        return []
    title = "Repeats averaged: one decision an utterance, by all its networks together, in per cent"
    return [
        _titled(Table(title, (*header, "accuracy"), tuple(rows))),
        "An utterance has one network in each whole repeat (alone: the mean of these repeats); none of them was "
        "trained on it. Together: by the mean of their probabilities (by --vote majority, by most of their decisions). "
        "Stratified repeats deal the folds anew, so together the networks have heard more of the other utterances than "
        "any one of them; repeats that leave one speaker out differ in their seeds alone.",
    ]


def _speakers(published: Published) -> list[str]:
    """Leave one speaker out: what to expect of a new speaker."""
    from npser.analysis import speaker_matrices, uar_interval

    rows, pictures = [], []
    for name, (config, results) in _ordinary(published, "speaker").items():
        s = summary_of(config, results)
        between = ends(uar_interval(speaker_matrices(results, config["vote"])))
        figures = (s.uar.pooled, s.average_f1.pooled, s.average_f1.mean, s.accuracy.pooled)
        shown = list(map(percent, figures))
        rows.append((_what(config), _done(config, results), shown[0], between, *shown[1:]))
        pictures.append(_pictures(name))
    header = ("network", "folds done", "pooled UAR", "95 % interval", "pooled F1", "F1, classes' means", "accuracy")
    return [_titled(Table("Leave one speaker out, in per cent", header, tuple(rows))), *pictures] if rows else []


def _order(published: Published) -> list[str]:
    """The order of the architectures and recipes: paired tests of each two runs on EMO-DB."""
    from npser.comparison import pairs

    runs = {n: r for n, r in _ordinary(published, "stratified").items() if r[0]["corpus"] == "emodb"}
    if len(runs) < 2:
        return []
    blocks = pairs([(Path(n), *r) for n, r in runs.items()], list(runs))
    return [_titled(block) if isinstance(block, Table) else block for block in blocks]


def _leakage(published: Published) -> list[str]:
    """A table for each network and its settings, then what each experiment does."""
    from bench.leakage import CHANGE, EXPERIMENTS, table

    alike: dict[str, list[tuple[Path, Mapping[str, Any], list[FoldResult]]]] = {}
    for name, (config, results) in published.items():
        if config.get("experiment") in EXPERIMENTS:
            own = {"experiment", *MAY_CHANGE} - {"backend", "precision"}
            same = {key: value for key, value in config.items() if key not in own}
            alike.setdefault(json.dumps(same, sort_keys=True), []).append((Path(name), config, results))
    parts = []
    for runs in alike.values():
        shown = table(runs)
        parts.append(_titled(Table(f"{_what(runs[0][1])}: {shown.title}", shown.header, shown.rows)))
        parts.append(CHANGE)
    present = {config["experiment"] for runs in alike.values() for _, config, _ in runs}
    said = "\n".join(f"- {name}: {what}" for name, what in EXPERIMENTS.items() if name in present)
    return [*parts, said] if parts else []


def _nested(published: Published) -> list[str]:
    from bench.nested import differing, table

    parts = []
    for config, results in published.values():
        if config.get("experiment") == "nested":
            others = _ordinary(published, "stratified").values()
            frozen = next((folds for other, folds in others if not differing(config, other)), [])
            shown = table(config, results, frozen)
            parts.append(_titled(Table(f"{_what(config)}: nested selection, F1 in per cent", shown.header, shown.rows)))
            parts.append(f"Chosen among {shown.title}.")
    return parts


def command_of(config: Mapping[str, Any]) -> str:
    """The command that makes such a run: options where they differ from the defaults."""
    experiment = config.get("experiment")
    module = "npser.train" if experiment is None else "bench.nested" if experiment == "nested" else "bench.leakage"
    words = ["python", "-m", module, "--arch", config["arch"], "--data", config["corpus"]]
    for name, usual in (("cv", "stratified"), ("recipe", "paper"), ("vote", "sum")):
        words += [f"--{name}", config[name]] if config[name] != usual else []
    for name, value in {**unusual(config), **off_recipe(config)}.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if name not in _WITHOUT_OPTION else []
    for change in config.get("changes", ()):
        words += ["--candidate", change]
    if experiment is None:  # the usual folder is that of one recipe, whatever else is asked for
        words += ["--out", f"runs/{name_of(config)}"]
    return shlex.join(words)


def origin(result: FoldResult) -> tuple[str, str, str, str]:
    """Where a fold comes from: commit, machine, threads, and how many folds were computed at once."""
    commit = str((result.run.get("versions") or {}).get("commit"))
    if also_by := result.run.get("also_by"):  # interrupted, and resumed with another program, or elsewhere
        commit += f", also {', '.join(map(str, also_by))}"
    machine, threads, at_once = (result.run.get(key) for key in ("machine", "threads", "workers"))
    return commit, str(machine), str(threads), str(at_once or 1)


def spans(folds: Sequence[tuple[int, int]]) -> str:
    """Folds (repeat, number) in words: 0.0 to 0.9, 1.0."""
    runs: list[list[tuple[int, int]]] = []
    for repeat, number in sorted(folds):
        if runs and runs[-1][-1] == (repeat, number - 1):
            runs[-1].append((repeat, number))
        else:
            runs.append([(repeat, number)])
    ends = [[f"{repeat}.{number}" for repeat, number in dict.fromkeys((run[0], run[-1]))] for run in runs]
    return ", ".join(" to ".join(both) for both in ends)


def _provenance(published: Published) -> list[str]:
    """Where the figures come from: a line for all folds of a run that were computed alike."""
    from bench.leakage import TRAININGS

    rows = []
    for name, (config, results) in published.items():
        recipe = "".join(f", with {name}={_spelt(value)}" for name, value in beyond_options(config).items())
        alike: dict[tuple[str, ...], list[FoldResult]] = {}
        for result in results:
            alike.setdefault(origin(result), []).append(result)
        for (commit, machine, threads, at_once), folds in alike.items():
            hours = sum(max(r.run.get("seconds", 0.0), sum(e.seconds for e in r.epochs)) for r in folds) / 3600
            made = (command_of(config) + recipe, commit, str(config["seed"]), machine, threads, at_once)
            rows.append((name, *made, spans([(r.repeat, r.fold) for r in folds]), f"{hours:.1f}"))
    header = ("run", "command", "commit", "seed", "machine", "threads", "at once", "folds", "hours")
    parts = [_titled(Table("Where these figures come from", header, tuple(rows), left=8))] if rows else []
    if rows:
        parts.append("A command computes its whole protocol; `--repeats 1` ends it after the first repeat.")
    experiments = {config.get("experiment") for config, _ in published.values()}
    shared = [" and ".join(names) for names in TRAININGS.values() if len(names) > 1 and experiments & {*names}]
    if shared:
        best = " Those of best-epoch end with that epoch." if "best-epoch" in experiments else ""
        parts.append(f"One training each, whose hours stand in every line of it: {'; '.join(shared)}.{best}")
    if "nested" in experiments:
        parts.append("Hours of nested selection are those of the configuration that was chosen, without the choice's.")
    return parts


# --- the README --------------------------------------------------------------------------------------------------


def between_markers(text: str) -> str:
    """What stands between the markers; UserError where they are not there."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"README.md: needs the lines {BEGIN} and {END}, once each")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def rewritten(text: str, published: Published) -> str:
    """The README's text with its tables made anew."""
    between_markers(text)
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    return f"{before}\n\n{results_text(published)}\n\n{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    p = Parser(
        prog="python -m bench.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, finished or not")
    p.add_argument("--unpack", nargs=2, type=Path, metavar=("FILE", "FOLDER"), help="make a run folder of a packed run")
    options = p.parse_args(arguments)
    if options.unpack and options.runs:
        raise UserError("--unpack: takes one file and one folder, and publishes nothing: leave away what else is named")
    if options.unpack:
        source, target = options.unpack
        packed = unpack(source)
        folder = RunFolder.open_or_create(target, packed.config)
        there = folder.finished()  # they may be the originals, with every digit
        for result in packed.folds:
            if (result.repeat, result.fold) not in there:
                folder.save_fold(result)
        print(f"{target}: {count(len(folder.finished()), 'folds')}")
        return 0
    for path in publish(options.runs):
        print(path.relative_to(ROOT))
    write_atomically(README, rewritten(README.read_text(encoding="utf-8"), shipped()))
    return 0


if __name__ == "__main__":
    run("bench.publish", main)
