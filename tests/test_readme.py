"""What the README tells its readers to type."""

import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, write_tone

from bench.develop import TABLE
from bench.develop import read as read_trials
from bench.race import Row
from bench.tables import Table, growth_line, memory_line, start_line
from npser.features import Standardisation
from npser.models import build_model
from npser.options import read
from npser.recipes import RECIPES

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(module):
    """The commands of a module, as they stand in code and in sentences, without what a shell does with them."""
    flat = re.sub(r"\s+", " ", TEXT)
    lines = re.findall(rf"^\$? ?python -m {module} (.*)$", TEXT, re.MULTILINE)
    return [*lines, *re.findall(rf"`python -m {module} ([^`]*)`", flat)]


def test_the_block_of_python_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_tone(tmp_path / "emodb" / "wav" / "03a01Fa.wav", 200)
    model = build_model("lstm", hidden=8, seed=1)
    model.scale = Standardisation(np.full(128, -5, np.float32), np.full(128, 2, np.float32))
    model.save(tmp_path / "model.npz")
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.strip() in model.labels
    assert np.isfinite(names["loss"])
    assert "lstm1.wx" in names["grads"]


@pytest.mark.parametrize("command", commands("npser.train"))
def test_options_of_npser_train_exist(command):
    words = ["2" if word == "N" else word for word in shlex.split(command.split("#")[0].split("|")[0])]
    if "--help" not in words and "..." not in command:
        read(words)


def printed_by(results):
    """What the benchmark has printed of these results, line by line, but for its first."""
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    yield versions
    if rows := results["rows"]:
        yield f"{results['machine']}; {results['threads']} threads; {results['date']}"
        names = dict.fromkeys(name for row in rows for name in row["candidates"])
        table = Table([SimpleNamespace(name=name) for name in names], results["peaks"])
        yield from table.head(rows[0]["section"]).splitlines()
        for row in rows:
            workload = SimpleNamespace(title=row["title"], operations=row["operations"], traffic=row["bytes"])
            times = {name: timed["rounds"] for name, timed in row["candidates"].items()}
            yield from table.line(Row(row["section"], workload, times, troubles=row["troubles"])).splitlines()
    for measured in results["memory"]:
        yield memory_line(**measured)
    for measured in results["starts"]:
        yield start_line(**measured)
    for series, points in results["growth"].items():
        yield growth_line(series, dict(sorted(points.items(), key=lambda point: int(point[0]))))


@pytest.mark.parametrize("name", ["train", "infer", "kernels", "growth"])
def test_the_benchmarks_figures_are_those_that_ship(name):
    results = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    behind = TEXT[TEXT.index(f"$ {results['command']}\n") :]
    block = re.split(r"\n\$ |\n```", behind, maxsplit=1)[0].splitlines()
    lines = list(printed_by(results))
    assert len(lines) > 10
    assert [line for line in lines if line not in block] == []


def test_the_trials_figures_are_those_that_ship():
    """F1 of the folds 0.1 and 0.2, as some configuration of that network has them, and their mean."""
    scores = {}
    for line in read_trials(TABLE):
        if line["fold"] in ("0.1", "0.2") and line["held_out"] == "0.33":
            made = scores.setdefault((line["arch"], line["settings"]), {}).setdefault((line["fold"], line["seed"]), [])
            made.append(tuple(float(line[name] or "nan") for name in ("f1", "f1_mean")))
    known = set()
    for (arch, _), trials in scores.items():
        for last in (False, True):  # the mean of the last three epochs, or the averaged weights after the last
            for length in (4, None):  # a training whose first half is shown, too
                f1 = {
                    fold: 100 * (made[:length][-1][1] if last else np.mean([f for f, _ in made[:length][-3:]]))
                    for (fold, seed), made in trials.items()
                    if seed == "0"
                }
                pair = [f1.get(fold, np.nan) for fold in ("0.1", "0.2")]
                known.add((arch, *("-" if np.isnan(x) else f"{x:.1f}" for x in (*pair, np.nanmean(pair)))))
    rows = re.findall(r"^\| (cnn|lstm|tdcnn) \| [^|]+ \| ([\d.-]+) \| ([\d.-]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert len(rows) > 10
    assert [row for row in rows if row not in known] == []


def test_sum_and_majority_are_as_far_apart_as_is_said():
    late = {}
    for line in read_trials(TABLE):
        if line["held_out"] == "0.33" and "speeds-scoring" not in line["settings"] and line["uar_majority"]:
            trial = late.setdefault(tuple(line[name] for name in ("arch", "settings", "fold", "seed")), [])
            trial.append(100 * (float(line["uar"]) - float(line["uar_majority"])))
    apart = np.array([d for trial in late.values() for d in trial[-3:]])
    said = f"a UAR {apart.mean():.1f} points above the majority's on average, the two being {np.abs(apart).mean():.1f} "
    assert f"{said}apart on average and {np.abs(apart).max():.1f} at most" in " ".join(TEXT.split())


def test_the_recipes_are_those_of_the_code():
    rows = re.findall(r"^\| (paper|best), (\w+) \| (\d+) \| (?:one of |)every (\d+) frames", TEXT, re.MULTILINE)
    told = {(name, arch): (int(epochs), int(hop)) for name, arch, epochs, hop in rows}
    assert len(told) == 5  # the sixth follows another
    for (name, arch), settings in told.items():
        recipe = RECIPES[name][arch]
        assert (recipe.epochs, recipe.segment_hop) == settings
    assert (RECIPES["best"]["tdcnn"].epochs, "| best, tdcnn | 10 |" in TEXT) == (10, True)


def test_there_are_such_commands():
    assert len(commands("npser.train")) > 5


@pytest.mark.parametrize("link", re.findall(r"\]\(#([^)]+)\)", TEXT))
def test_links_lead_to_headings(link):
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    assert link in [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]
