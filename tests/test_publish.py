"""Published runs: packed without loss, and every table of the README made of them."""

import json
import lzma
import re
import shlex
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from test_report import CONFIG, make_fold

from bench import publish
from npser import train
from npser.errors import UserError
from npser.foldresult import fold_result
from npser.metrics import average_f1, confusion_matrix, unweighted_average_recall
from npser.options import read
from npser.packed import SUFFIX, open_run, pack, unpack
from npser.recipes import RECIPES, as_settings
from npser.report import main as report_main
from npser.report import merged
from npser.runfolder import RunFolder
from npser.runreport import render_markdown
from npser.synthetic import demo_corpus

LABELS = ("neutral", "anger")


def config(**changes):
    arch = changes.get("arch", "cnn")
    made = {**CONFIG, "recipe": "paper", **as_settings(RECIPES["paper"][arch]), "arch": arch, "corpus": "emodb"}
    return {**made, "folds": 10, "repeats": 5, **changes}


def some_fold(repeat, fold, seed=0):
    """A fold with unpleasant probabilities: more digits than are kept, and two that are nearly equal."""
    rng = np.random.default_rng((seed, repeat, fold))
    p = rng.dirichlet((1, 1), 20)
    p[0] = 0.5 + 1e-9, 0.5 - 1e-9
    truth = np.arange(20) % 2
    names = [f"{n}.wav" for n in range(20 * fold, 20 * fold + 20)]
    run = {"seconds": 1800.0, "machine": "a machine", "threads": 2, "versions": {"commit": "abc"}}
    return fold_result(
        repeat=repeat, fold=fold, labels=LABELS, vote="sum", epochs=make_fold(0, 0, [0, 0, 1, 1]).epochs, files=names,
        speakers=[f"{n % 4}" for n in range(20)], truth=truth, probabilities=p, majority=p.argmax(1), run=run,
    )  # fmt: skip


def save(folder, settings, folds):
    run = RunFolder.open_or_create(folder, settings)
    for result in folds:
        run.save_fold(result)
    return folder


def test_a_packed_run_reports_what_the_folder_does(tmp_path, capsys):
    folds = [some_fold(r, f) for r in (0, 1) for f in (0, 1)]
    folder = RunFolder.open(save(tmp_path / "run", config(), folds))
    pack(folder.config, folds[::-1], tmp_path / "run.json.xz")
    packed = open_run(tmp_path / "run.json.xz")
    assert packed.config == folder.config
    assert [r.confusion for r in packed.load_folds()] == [r.confusion for r in folder.load_folds()]
    assert render_markdown(packed.config, packed.load_folds()) == render_markdown(folder.config, folds)
    assert report_main([str(tmp_path / "run.json.xz")]) == 0
    alone = capsys.readouterr().out
    assert report_main([str(folder.path)]) == 0
    assert capsys.readouterr().out == alone


@pytest.mark.parametrize("damage", ["text", "truncated", "a decision", "no folds"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "run.json.xz"
    pack(config(), [some_fold(0, 0)], path)
    content = json.loads(lzma.decompress(path.read_bytes()))
    if damage == "text":
        path.write_text("not compressed")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        if damage == "no folds":
            del content["folds"]
        else:
            content["folds"][0]["confusion"]["sum"][0][0] += 1
        path.write_bytes(lzma.compress(json.dumps(content).encode()))
    with pytest.raises(UserError, match=r"run\.json\.xz"):
        unpack(path)


def test_a_growing_run_keeps_what_was_published(tmp_path):
    runs, pictures = tmp_path / "runs", tmp_path / "pictures"
    pytest.importorskip("matplotlib")
    save(tmp_path / "here", config(threads=1), [some_fold(0, 0), some_fold(0, 1)])
    save(tmp_path / "there", config(threads=2), [some_fold(1, 0)])
    written = publish.publish([tmp_path / "here"], runs, pictures)
    assert {path.name for path in written} == {
        "cnn-emodb-s0.json.xz",
        "cnn-emodb-s0-confusion.png",
        "cnn-emodb-s0-curves.png",
    }
    publish.publish([tmp_path / "there"], runs, pictures)
    ((settings, folds),) = publish.shipped(runs).values()
    assert [(r.repeat, r.fold) for r in folds] == [(0, 0), (0, 1), (1, 0)]
    assert settings["epochs"] == config()["epochs"]
    save(tmp_path / "other", config(features={"hop": 64}), [some_fold(1, 1)])
    save(tmp_path / "changed", config(), [some_fold(0, 0, seed=8)])
    for folder in ("other", "changed"):
        with pytest.raises(UserError, match="its settings or its decisions are not those of"):
            publish.publish([tmp_path / folder], runs, pictures)
    save(tmp_path / "split", config(cv="split", folds=1), [some_fold(0, 0)])
    with pytest.raises(UserError, match="cannot be published"):
        publish.publish([tmp_path / "split"], runs, pictures)
    save(tmp_path / "longer", config(epochs=99), [some_fold(1, 1)])  # not the recipe: a run of its own
    publish.publish([tmp_path / "longer"], runs, pictures)
    assert list(publish.shipped(runs)) == ["cnn-emodb-epochs99-s0", "cnn-emodb-s0"]
    assert "| cnn, paper recipe, epochs 99 | 1 of 50 |" in publish.results_text(publish.shipped(runs))
    (runs / "cnn-emodb-s0.json.xz").rename(runs / "cnn-emodb-s1.json.xz")
    with pytest.raises(UserError, match=r"s1\.json\.xz: the run in it is called cnn-emodb-s0"):
        publish.shipped(runs)


def test_a_run_is_called_by_everything_that_makes_it_another():
    others = [
        config(), config(seed=1), config(folds=5), config(repeats=1), config(corpus="ravdess"), config(backend="cuda"),
        config(backend="cuda", precision="tf32"), config(cv="speaker"), config(recipe="best"), config(epochs=9),
        config(training=config()["training"] | {"clip_norm": 2.0}),
        config(training=config()["training"] | {"speeds": [0.9, 1.1]}), config(experiment="honest"),
    ]  # fmt: skip
    names = [publish.name_of(c) for c in others]
    assert len(set(names)) == len(names) - 1  # a run of one repeat may become one of five
    labels = [publish._what(c) for c in others if c["cv"] == "stratified" and not c.get("experiment")]
    assert len(set(labels)) == len(labels) - 2  # folds and repeats have tables of their own
    assert "with clip\\_norm=2 |" in publish.results_text({"a": (others[10], [some_fold(0, 0)])})


def test_runs_that_decided_otherwise_are_not_put_together(tmp_path):
    a = RunFolder.open(save(tmp_path / "a", config(), [some_fold(0, 0)]))
    b = RunFolder.open(save(tmp_path / "b", config(backend="cuda"), [some_fold(0, 0, seed=1), some_fold(0, 1)]))
    c = RunFolder.open(save(tmp_path / "c", config(), [some_fold(0, 1)]))
    assert [len(results) for _, results in merged([a, b])] == [1, 2]
    assert [len(results) for _, results in merged([a, c])] == [2]


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_that_was_begun_with_fewer_repeats_is_the_same_run(tmp_path, order):
    fewer = save(tmp_path / "fewer", config(repeats=1), [some_fold(0, 0), some_fold(0, 1)])
    more = save(tmp_path / "more", config(), [some_fold(0, 1), some_fold(1, 0)])
    ((run, results),) = merged([RunFolder.open(path) for path in (fewer, more)[::order]])
    assert run.config["repeats"] == 5
    assert sorted((r.repeat, r.fold) for r in results) == [(0, 0), (0, 1), (1, 0)]
    pytest.importorskip("matplotlib")
    for path in (fewer, more)[::order]:
        publish.publish([path], tmp_path / "runs", tmp_path / "pictures")
    ((published, folds),) = publish.shipped(tmp_path / "runs").values()
    assert (published["repeats"], len(folds)) == (5, 3)


def test_another_machine_goes_on_from_the_packed_run(tmp_path, capsys):
    pack(config(), [some_fold(0, 1)], tmp_path / "run.json.xz")
    publish.main(["--unpack", str(tmp_path / "run.json.xz"), str(tmp_path / "run")])
    folder = RunFolder.open_or_create(tmp_path / "run", config())
    assert folder.finished() == [(0, 1)]
    folder.save_fold(some_fold(0, 1))
    pack(
        config(),
        [replace(some_fold(0, f), run={"machine": "the packed one's"}) for f in (0, 1)],
        tmp_path / "run.json.xz",
    )
    publish.main(["--unpack", str(tmp_path / "run.json.xz"), str(tmp_path / "run")])
    machines = [result.run["machine"] for result in folder.load_folds()]
    assert machines == ["the packed one's", "a machine"]  # what was there has more digits
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'run'}: 2 folds"


def test_a_run_of_a_version_that_knew_fewer_fields_goes_on(tmp_path):
    older = config(training={name: value for name, value in config()["training"].items() if name != "label_smoothing"})
    run = save(tmp_path / "run", older, [some_fold(0, 0)])
    assert RunFolder.open_or_create(run, config()).finished() == [(0, 0)]
    pack(older, [some_fold(0, 0)], tmp_path / f"cnn-emodb-s0{SUFFIX}")
    assert list(publish.shipped(tmp_path)) == ["cnn-emodb-s0"]
    with pytest.raises(UserError, match="training"):
        RunFolder.open_or_create(run, config(training=config()["training"] | {"label_smoothing": 0.1}))


def test_the_tables_hold_every_run():
    best = [some_fold(0, 0, seed=3), some_fold(0, 2, seed=3)]
    folds = [some_fold(r, f) for r in (0, 1) for f in (0, 1)]
    published = {
        "cnn-emodb-s0": (config(), folds),
        "lstm-emodb-s0": (config(arch="lstm"), [some_fold(0, f, seed=1) for f in (0, 1)]),
        "cnn-emodb-speaker-s0": (config(cv="speaker", folds=4, repeats=1), folds[:2]),
        "honest-cnn-emodb-s0": (config(experiment="honest"), folds[:2]),
        "best-epoch-cnn-emodb-s0": (config(experiment="best-epoch"), best),
        "windows-split-lstm-emodb-s0": (config(experiment="windows-split", arch="lstm"), folds[2:]),
    }
    text = publish.results_text(published)
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if line.startswith("|")
    }
    f1 = [np.nanmean([publish_f1(r) for r in part]) for part in (folds, folds[:2])]
    assert rows["honest"][1] == f"{100 * f1[1]:.2f}"
    assert rows["windows-split"][2:4] == ["-", "-"]  # what is beside it is another network's
    assert rows["best-epoch"][2:4] == [
        "honest",
        f"{100 * (publish_f1(best[0]) - publish_f1(folds[0])):+.2f}",
    ]  # their common fold
    assert rows["cnn, paper recipe"][0] == "2 of 4"  # the last table with such a row: leave one speaker out
    assert f"| cnn, paper recipe | 4 of 50 | {100 * f1[0]:.2f} |" in text
    assert "86.06 (+-2.39)" in text
    assert "cnn-emodb-s0 - lstm-emodb-s0" in text
    assert "python -m npser.train --arch cnn --data emodb --cv speaker --repeats 1" in text
    assert rows["cnn-emodb-s0"][-2:] == ["0.0 to 0.1, 1.0 to 1.1", "2.0 |"]
    shared = "best-epoch and windows-scored and few-windows-voted; windows-split and windows-split-voted."
    assert text.endswith(f"{shared} Those of best-epoch end with that epoch.")


def test_whole_repeats_are_averaged_in_a_table_of_their_own():
    folds = [some_fold(r, f) for r in (0, 1, 2) for f in (0, 1)]
    text = publish.results_text({"cnn-emodb-s0": (config(folds=2), folds[:5]), "lstm": (config(), folds[:4])})
    assert text.count("#### Repeats averaged") == 1
    [line] = re.findall(r"^\| cnn, paper recipe \| 2 \| (.*) \|$", text, re.MULTILINE)
    cells = line.split(" | ")
    truth = np.arange(20) % 2
    p = np.array([[u.probabilities for u in r.utterances] for r in folds[:4]]).reshape(2, 2, 20, 2)  # repeat, fold
    together = p.mean(axis=0).argmax(axis=2)
    alone = confusion_matrix(np.tile(truth, 4), p.argmax(axis=3).ravel(), 2)
    matrices = [confusion_matrix(truth, decisions, 2) for decisions in together]
    figures = (
        np.mean([publish_f1(r) for r in folds[:4]]), np.mean([average_f1(m) for m in matrices]),
        unweighted_average_recall(alone), unweighted_average_recall(sum(matrices)),
    )  # fmt: skip
    assert cells[:4] == [f"{100 * figure:.2f}" for figure in figures]
    assert re.fullmatch(r"[\d.]+ to [\d.]+", cells[4])
    assert cells[5] == f"{100 * (together == truth).mean():.2f}"


def test_folds_that_were_computed_elsewhere_have_a_line_of_their_own():
    folds = [some_fold(0, f) for f in range(5)]
    elsewhere = {**folds[0].run, "machine": "another, machine", "threads": 1, "workers": 2}
    folds[2:4] = [replace(r, run=elsewhere) for r in folds[2:4]]
    begun = {**folds[1].run, "also_by": ["def on a machine"]}
    resumed = publish.results_text({"cnn-emodb-s0": (config(), [folds[0], replace(folds[1], run=begun)])})
    assert "| abc, also def on a machine | 0 | a machine | 2 | 1 | 0.1 | 0.5 |" in resumed
    lines = [line for line in publish.results_text({"cnn-emodb-s0": (config(), folds)}).splitlines() if " abc " in line]
    assert [line.split(" | ")[-5:] for line in lines] == [
        ["a machine", "2", "1", "0.0 to 0.1, 0.4", "1.5 |"],
        ["another, machine", "1", "2", "0.2 to 0.3", "1.0 |"],
    ]


def test_what_a_changed_checkout_computed_is_not_published(tmp_path):
    run = {"versions": {"commit": "abc-dirty"}}
    save(tmp_path / "run", config(), [some_fold(0, 0), replace(some_fold(0, 1), run=run)])
    with pytest.raises(UserError, match=r"fold 0\.1 was computed by a checkout with changes \(abc-dirty\)"):
        publish.publish([tmp_path / "run"], tmp_path / "runs", tmp_path / "pictures")
    assert not (tmp_path / "runs").exists()


def test_what_is_published_stays_what_it_is(tmp_path):
    pytest.importorskip("matplotlib")
    fold, runs, pictures = some_fold(0, 0), tmp_path / "runs", tmp_path / "pictures"
    publish.publish([save(tmp_path / "one", config(), [fold])], runs, pictures)
    again = replace(fold, run={**fold.run, "machine": "another"})
    publish.publish([save(tmp_path / "two", config(), [again, some_fold(0, 1)])], runs, pictures)
    ((_, folds),) = publish.shipped(runs).values()
    assert [(r.fold, r.run["machine"]) for r in folds] == [(0, "a machine"), (1, "a machine")]


def publish_f1(result):
    from npser.metrics import average_f1

    return average_f1(result.matrix("sum"))


def test_the_readme_holds_the_tables_of_the_shipped_runs():
    text = publish.README.read_text(encoding="utf-8")
    published = publish.shipped()
    assert publish.between_markers(text) == publish.results_text(published)
    assert publish.rewritten(text, published) == text
    for picture in re.findall(r"\]\((bench/results/pictures/[^)]+)\)", text):
        assert (publish.ROOT / picture).is_file(), picture


def test_only_the_part_between_the_markers_is_rewritten():
    text = f"before\n\n{publish.BEGIN}\n\nworn out\n\n{publish.END}\n\nafter\n"
    made = publish.rewritten(text, {"cnn-emodb-s0": (config(), [some_fold(0, 0)])})
    assert made.startswith("before\n\n")
    assert made.endswith("\n\nafter\n")
    assert "worn out" not in made
    with pytest.raises(UserError, match="once each"):
        publish.rewritten(text.replace(publish.END, ""), {})


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--cv", "speaker", "--repeats", "2"),
        ("--recipe", "best", "--seed", "7"),
        ("--epochs", "3", "--segment-hop", "9", "--batch-size", "5", "--vote", "majority", "--folds", "4"),
        ("--arch", "tdcnn", "--share-windows", "4"),
    ],
)
def test_the_command_that_is_shown_makes_the_run_again(options):
    corpus = demo_corpus()
    given = read(("--arch", "lstm", "--data", "emodb", *options))
    made = train._config(given, replace(corpus, name="emodb"), 1, False)
    again = read(shlex.split(publish.command_of(made))[3:])
    assert train._config(again, replace(corpus, name="emodb"), 1, False) == made


def test_a_real_run_is_published(tones, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("npser.runconfig.versions", lambda: {"commit": "abc"})  # whatever the checkout's state is
    short = ("--folds", "2", "--repeats", "1", "--epochs", "2", "--segment-hop", "40", "--threads", "1")
    train.main(["--arch", "lstm", "--data", str(tones), *short, "--out", str(tmp_path / "run")])
    publish.publish([tmp_path / "run"], tmp_path / "runs", tmp_path / "pictures")
    published = publish.shipped(tmp_path / "runs")
    ((name, (_, folds)),) = published.items()
    assert len(folds) == 2
    assert name.endswith("-epochs2-segment-hop40-folds2-s0")
    what, f1 = (
        f"lstm, {tones.name}, paper recipe, epochs 2, segment hop 40",
        100 * np.mean([publish_f1(r) for r in folds]),
    )
    assert f"| {what} | 2 of 2 | {f1:.2f} |" in publish.results_text(published)
    assert all((tmp_path / "pictures" / f"{name}-{kind}.png").stat().st_size for kind in publish.DRAWN)


def test_published_files_are_not_ignored_by_git():
    if not (publish.ROOT / ".git").exists():
        pytest.skip("not a checkout")
    for path in (publish.RUNS / f"any{SUFFIX}", publish.PICTURES / "any.png"):
        ignored = subprocess.run(["git", "-C", publish.ROOT, "check-ignore", "-q", path], check=False)
        assert ignored.returncode == 1, path
