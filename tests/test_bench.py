"""The benchmark suite: candidates compute the same, a wrong one is caught, turns and statistics. Nothing is timed."""

import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, has_gpu, run_module

import bench.__main__ as command
from bench import machine, race, suites, tables, worker, workloads
from bench.peers import (
    CANDIDATES,
    CUDA_CANDIDATES,
    JAX,
    ONNX,
    OURS,
    TORCH,
    TORCH_COMPILE,
    TORCH_LOOP,
    TORCH_NHWC,
    Prepared,
    named,
)
from bench.race import Pace, Race, Row, Worker, interleave
from bench.workloads import Workload
from npser.errors import UserError
from npser.models import ARCHITECTURES, build_model, parameter_count

TINY = {"filters": 4, "hidden": 8, "bins": 16}


def conv(kind, C, backward, need_dx=True):
    return Workload(kind, kind, {"B": 2, "T": 9, "F": 6, "C": C, "O": 5, "backward": backward, "need_dx": need_dx})


OPERATIONS = [
    conv("conv_block", 1, False),
    conv("conv_block", 1, True, need_dx=False),
    conv("conv_block", 3, True),
    conv("conv3x3", 3, False),
    conv("conv3x3", 3, True),
    Workload("maxpool", "", {"B": 2, "T": 6, "F": 5, "C": 3}),
    Workload("relu", "", {"N": 1000}),
    Workload("sgd", "", {"N": 1000}),
    Workload("dropout", "", {"N": 100_000}, tolerance=0.05),
    Workload("dense_forward", "", {"N": 5, "I": 12, "J": 7}),
    Workload("dense_backward_input", "", {"N": 5, "I": 12, "J": 7}),
    Workload("dense_update", "", {"N": 5, "I": 12, "J": 7}),
    Workload("lstm", "", {"B": 3, "T": 5, "I": 6, "H": 4, "backward": False}),
    Workload("lstm", "", {"B": 3, "T": 5, "I": 6, "H": 4, "backward": True}),
    Workload("cross_entropy", "", {"B": 4, "K": 7}),
    Workload("stft", "", {"N": 2000}),
]
NETWORKS = [
    *(Workload("train", "", {"arch": arch, "B": 3, "model": TINY}, tolerance=1e-3) for arch in ARCHITECTURES),
    *(Workload("infer", "", {"arch": arch, "B": 6, "model": TINY}) for arch in ARCHITECTURES),
]
LIBRARY_CALLS = {"dense_forward", "dense_backward_input", "dense_update", "lstm", "sgd"}
LEAST = {  # what a candidate must offer, or the comparison would be empty
    OURS: {w.kind for w in OPERATIONS},
    TORCH: {w.kind for w in OPERATIONS},
    TORCH_NHWC: {"conv_block", "conv3x3", "maxpool"},
    TORCH_LOOP: set(),
    JAX: {w.kind for w in OPERATIONS},
    ONNX: {"conv_block", "conv3x3", "dense_forward", "lstm"},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two short utterances, one of them shorter than a window."""
    path = tmp_path_factory.mktemp("recorded") / "samples.npz"
    samples = np.random.default_rng(0).standard_normal(40_000).astype(np.float32) * np.float32(0.1)
    np.savez(path, samples=samples, ends=np.array([28_000, 40_000]))
    return path


@pytest.fixture(scope="module")
def everything(recorded):
    """All tiny workloads, those on whole utterances included."""
    labelling = []
    for arch in ARCHITECTURES:
        sizes = workloads.label_sizes(recorded, arch, hop=8) | {"model": {"filters": 4, "hidden": 8}}
        labelling.append(Workload("label", "", sizes))
    return [*OPERATIONS, *NETWORKS, *labelling]


@pytest.fixture(scope="module")
def references(everything, tmp_path_factory):
    """The file with the reference's results of each workload."""
    folder, made = tmp_path_factory.mktemp("references"), Worker("reference", 1)
    try:
        paths = [str(folder / f"{n}.npz") for n in range(len(everything))]
        for workload, path in zip(everything, paths, strict=True):
            made.ask("prepare", kind=workload.kind, sizes=workload.sizes, reference=path)
        return paths
    finally:
        made.close()


@pytest.mark.parametrize("candidate", LEAST, ids=lambda c: c.name)
def test_candidates_compute_what_the_reference_does(candidate, everything, references):
    if missing := candidate.missing():
        pytest.skip(f"{', '.join(missing)} not installed")
    process, offered = Worker(candidate.name, 1), set()
    try:
        for workload, path in zip(everything, references, strict=True):
            reply = process.ask("prepare", kind=workload.kind, sizes=workload.sizes, reference=path)
            if reply.get("offered", True):
                assert reply["error"] <= workload.tolerance, (workload, reply)
                offered.add(workload.kind)
                process.ask("begin")
                assert len(process.ask("run", seconds=0)["times"]) == 1
    finally:
        process.close()
    assert LEAST[candidate] <= offered
    assert ({"train"} if candidate is TORCH_LOOP else {"infer", "label"}) <= offered
    assert ("train" in offered) == (candidate is not ONNX)


@pytest.mark.slow
def test_torch_compile_computes_what_the_reference_does(everything, references):
    if TORCH_COMPILE.missing():
        pytest.skip("torch not installed")
    process = Worker(TORCH_COMPILE.name, 1)
    try:
        replies = [
            process.ask("prepare", kind=w.kind, sizes=w.sizes, reference=path)
            for w, path in zip(everything, references, strict=True)
        ]
    finally:
        process.close()
    for workload, reply in zip(everything, replies, strict=True):
        assert reply.get("offered", True) == (workload.kind not in LIBRARY_CALLS | {"conv3x3", "stft"})
        assert reply.get("error", 0) <= workload.tolerance, (workload, reply)


def test_memory_is_of_a_process_that_trained(monkeypatch):
    workload = Workload("memory", "", {"arch": "cnn", "B": 2, "model": TINY})
    assert race.peak_memory(OURS, workload, 1) > 50e6
    asked = []

    class Noting:
        def __init__(self, *_, **__):
            pass

        def ask(self, do, **_):
            asked.append(do)
            return {"bytes": 1}

        def close(self):
            pass

    monkeypatch.setattr(race, "Worker", Noting)
    race.peak_memory(OURS, workload, 1)
    assert asked == ["prepare", "begin", "run", "remember"]


def test_a_first_step_compiles_kernels_and_keeps_them(tmp_path):
    workload = Workload("memory", "", {"arch": "lstm", "B": 2, "model": TINY})
    kept = []
    for _ in range(2):
        assert race.first_step(workload, 1, tmp_path / "kernels") > 0
        kept.append({path: path.stat().st_mtime_ns for path in (tmp_path / "kernels").rglob("*.nbi")})
    assert kept[0]
    assert kept[0] == kept[1]


# --- wrong results -----------------------------------------------------------------------------------------------


class Off:
    """A candidate whose result is off by so much in one entry."""

    def __init__(self, by):
        self.by = by

    def prepare(self, kind, inputs, sizes):
        y = np.maximum(inputs["x"], 0)
        dx = np.where(inputs["x"] > 0, inputs["dy"], 0)
        dx[17] += self.by
        return Prepared(lambda: {"y": y, "dx": dx}, lambda: lambda: None)


@pytest.fixture
def reference_file(tmp_path):
    path, reference = str(tmp_path / "reference.npz"), worker.Bench("reference", "cpu")
    reference.prepare("relu", {"N": 100}, path)
    return path


@pytest.mark.parametrize("by", [0.0, 1e-2, float("nan")])
def test_one_wrong_entry_is_seen(by, reference_file):
    b = worker.Bench("npser", "cpu")
    b.candidate = Off(by)
    reply = b.prepare("relu", {"N": 100}, reference_file)
    if by == 0:
        assert reply["error"] == 0
    else:
        assert reply["error"] > 1e-3
        assert reply["where"] == "dx"


def test_missing_and_misshapen_outputs_are_wrong():
    x = np.ones((3, 4))
    expected = workloads.sampled({"a": x})
    assert workloads.difference(workloads.sampled({"a": x}), expected)[0] == 0
    assert workloads.difference({}, expected) == (math.inf, "a")
    assert workloads.difference(workloads.sampled({"a": x}), expected | {"a": np.nan * expected["a"]})[0] == math.inf
    assert workloads.difference(workloads.sampled({"a": x[:2]}), expected)[0] == math.inf
    assert workloads.difference(workloads.sampled({"a": x.T}), expected)[0] > 0


class FakeWorker:
    """Answers like a worker; notes what it was asked."""

    process = type("Process", (), {"pid": os.getpid()})
    alive = True

    def __init__(self, name, log, error=0.0, times=(1.0,), fails_at=None):
        self.name, self.log, self.error, self.times, self.fails_at = name, log, error, list(times), fails_at

    def ask(self, do, **details):
        self.log.append((self.name, do))
        if do == self.fails_at:
            raise race.Failed("out of luck")
        if do == "run":
            return {"times": [self.times[0] if len(self.times) == 1 else self.times.pop(0)]}
        return {"error": self.error, "where": "y"} if do == "prepare" else {}

    def close(self):
        self.log.append((self.name, "close"))


def fake_race(tmp_path, monkeypatch, **behaviour):
    """A race of OURS, TORCH and JAX on fake workers, and the log of what these were asked."""
    monkeypatch.setattr(race, "PAUSE", 0)
    log = []
    candidates = (OURS, TORCH, JAX)
    contest = Race(candidates, 1, Pace(turn=0, row=0, least_rounds=3), tmp_path)
    for name in ("reference", *(c.name for c in candidates)):
        contest.workers[name] = FakeWorker(name, log, **behaviour.get(name, {}))
    return contest, log


def test_a_wrong_candidate_is_reported_and_not_timed(tmp_path, monkeypatch):
    contest, log = fake_race(tmp_path, monkeypatch, torch={"error": 1e-2})
    row = contest.run("kernels", Workload("relu", "ReLU", {"N": 100}))
    assert row.wrong == ["torch"]
    assert "wrong: y differs from the reference by 0.01" in row.troubles["torch"]
    assert ("torch", "begin") not in log
    assert ("torch", "run") not in log
    assert row.times.keys() == {"npser", "jax"}
    line = tables.Table(contest.candidates, {"flops": 1.0, "read": 1.0, "update": 1.0}).line(row)
    assert re.search(r"ReLU .* wrong ", line)


def test_a_candidate_that_fails_leaves_the_others_their_row(tmp_path, monkeypatch):
    contest, log = fake_race(tmp_path, monkeypatch, torch={"fails_at": "run"})
    row = contest.run("kernels", Workload("relu", "ReLU", {"N": 100}))
    assert row.troubles == {"torch": "out of luck"}
    assert row.wrong == []
    assert log.count(("torch", "run")) == 1
    assert ("torch", "close") in log
    assert {name: len(times) for name, times in row.times.items()} == {"npser": 3, "jax": 3}


def test_a_candidate_that_dies_at_the_end_of_a_row_keeps_its_times(tmp_path, monkeypatch):
    contest, log = fake_race(tmp_path, monkeypatch, torch={"fails_at": "rest"})
    row = contest.run("kernels", Workload("relu", "ReLU", {"N": 100}))
    assert row.troubles == {}
    assert {name: len(times) for name, times in row.times.items()} == {"npser": 3, "torch": 3, "jax": 3}
    assert log[-3:] == [("torch", "rest"), ("torch", "close"), ("jax", "rest")]
    assert "torch" not in contest.workers


def test_no_reference_no_times(tmp_path, monkeypatch):
    contest, log = fake_race(tmp_path, monkeypatch, reference={"fails_at": "prepare"})
    row = contest.run("kernels", Workload("relu", "ReLU", {"N": 100}))
    assert row.faulty
    assert row.times == {}
    assert not any(do == "run" for _, do in log)


def test_peers_do_without_our_compiled_kernels():
    """Importing them would make everybody's idle OpenMP threads sleep, which is our choice, and start Numba."""
    code = (
        "import sys, bench.peers.ours, bench.peers.scoring as s, bench.workloads as w\n"
        "w.inputs('train', {'arch': 'tdcnn', 'B': 2, 'model': {'filters': 4, 'hidden': 8, 'bins': 16}})\n"
        "assert not {'kernels.cpu', 'numba', 'llvmlite'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_candidates_on_a_gpu_are_told_apart():
    names = [candidate.name for candidate in CUDA_CANDIDATES]
    assert len(set(names)) == len(names)
    assert [named(name, "cuda") for name in names] == list(CUDA_CANDIDATES)
    assert named("npser") is OURS
    assert all(candidate.device == "cuda" for candidate in CUDA_CANDIDATES)
    for section in ("kernels", "train", "infer"):
        assert suites.candidates(section, True, "cuda")[0].name == OURS.name  # whom the ratio is of
    assert CUDA_CANDIDATES[1].tf32
    assert CUDA_CANDIDATES[1].tolerance(1e-4) > CUDA_CANDIDATES[0].tolerance(1e-4) == 1e-4


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("candidate", CUDA_CANDIDATES, ids=lambda c: c.name)
def test_a_framework_without_a_gpu_says_so(candidate, references):
    """It must not be timed on the cpu instead."""
    if missing := candidate.missing():
        pytest.skip(f"{', '.join(missing)} not installed")
    process = Worker(candidate.name, 1, "cuda")
    try:
        with pytest.raises(race.Failed):
            process.ask("prepare", kind="train", sizes=NETWORKS[0].sizes, reference=references[0])
    finally:
        process.close()


# --- turns and statistics ----------------------------------------------------------------------------------------


def test_everyone_has_a_turn_in_every_round_and_another_one_begins():
    turns = []
    times = interleave("abc", lambda name: float(len(turns)) if turns.append(name) is None else 0, 4, 4, 1e9)
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (40, 4), (1000, 9)])
def test_rounds_end_with_the_time_but_not_before_the_least(seconds, rounds):
    turns = []  # of ten seconds each
    interleave("a", lambda _: turns.append(1) or 1.0, 3, 9, seconds, lambda: 10.0 * len(turns))
    assert len(turns) == rounds


def test_ratio_is_of_medians_and_its_spread_of_rounds():
    row = Row("kernels", Workload("relu", "", {"N": 1}))
    row.times = {"npser": [1.0, 2.0, 4.0], "torch": [6.0, 6.0, 6.0], "jax": [5.0, 8.0, 7.0]}
    assert row.fastest_peer == "torch"
    assert row.ratio == (3.0, (1.5 + 3) / 2, (3 + 6) / 2)
    row.times |= {"npser-tf32": [0.1] * 3, "torch-tf32": [0.1] * 3, "graph-tf32": [0.1] * 3, "jax-tf32": [0.1] * 3}
    assert row.fastest_peer == "torch"  # of those that compute in float32
    row.times.pop("npser")
    assert row.ratio is None
    assert race.quartiles([2.0]) == (2.0, 2.0)


def test_share_of_peak_takes_the_nearer_limit():
    row = Row("kernels", Workload("dense_forward", "", {"N": 10, "I": 100, "J": 100}))
    row.times = {"npser": [2.0]}
    operations, traffic = 2 * 10 * 100 * 100, 4 * (1000 + 1000 + 10_000)
    assert (row.workload.operations, row.workload.traffic) == (operations, traffic)
    peaks = {"flops": operations, "read": traffic * 2, "update": traffic}
    assert tables.share_of_peak(row, peaks) == (0.5, "f")
    assert tables.share_of_peak(row, peaks | {"flops": 1e9}) == (0.25, "m")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-5, "0.0123"), (1.234e-3, "1.23"), (0.01234, "12.3"), (0.1234, "123"), (12.34, "12300")],
)
def test_three_figures(seconds, text):
    assert tables.short(seconds) == text


# --- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_counted_weights_are_the_networks(arch):
    sizes = {"arch": arch, "model": TINY}
    matrices = [size for size, _ in workloads.weight_matrices(sizes)]
    assert matrices == [v.size for v in build_model(arch, **TINY).params.values() if v.ndim > 1]
    counted = sum(size for size, _ in workloads.weight_matrices({"arch": arch, "model": {}}))
    assert counted == pytest.approx(parameter_count(arch), rel=0.005)  # which counts biases, too


@pytest.mark.parametrize(("arch", "giga"), [("cnn", 14.3), ("lstm", 9.13), ("tdcnn", 144)])
def test_operations_of_a_training_step(arch, giga):
    """Counted by hand for batch 32."""
    assert suites._step(arch, 32).operations / 1e9 == pytest.approx(giga, rel=0.02)


def test_trained_convolutions(tmp_path, monkeypatch):
    """A workload after some updates has other convolutions than a fresh one, and windows of the corpus."""
    monkeypatch.setattr(workloads, "UPDATES", 2)
    path = tmp_path / "trained.npz"
    workloads.train_convolutions(path)
    fresh = {"arch": "cnn", "B": 3, "model": {}}
    initial, later = (workloads.inputs("train", sizes) for sizes in (fresh, fresh | {"trained": str(path)}))
    assert initial.keys() == later.keys()
    assert later["x"].shape == (3, 128, 128)
    for name in initial.keys() - {"y"}:
        assert np.array_equal(initial[name], later[name]) == name.startswith(("dense", "out")), name


def test_suites_are_made_of_what_candidates_offer(recorded, tmp_path):
    for quick in (False, True):
        rows = [*suites.kernels(quick), *suites.train(quick, recorded)]
        rows += suites.infer(quick, recorded, recorded, recorded, "demo")
        assert len({row.title for row in rows}) == len(rows)
        for row in rows:
            assert len(row.title) <= tables.TITLE
            assert row.operations + row.traffic > 0
    grown = list(suites.growth(tmp_path, recorded))
    assert {row.sizes["windows"] for _, _, row in grown if row.kind == "label"} == {1, 4, 16, 64}


# --- the command -------------------------------------------------------------------------------------------------


def test_machine_can_be_measured():
    rates = machine.measure(steps=1000, floats=1 << 14)
    assert rates.keys() == {"flops", "read", "update"}
    assert all(0 < rate < math.inf for rate in rates.values())


def test_worker_answers_failures_in_one_line():
    class Broken:
        def begin(self):
            raise RuntimeError("first\nsecond")

    replies = io.StringIO()
    worker.serve(Broken(), io.StringIO('{"do": "begin"}\n'), replies)
    assert json.loads(replies.getvalue()) == {"failed": "RuntimeError: first"}


@pytest.fixture
def small_command(monkeypatch):
    """The command with two small rows, our own column and no measurement of the machine."""
    two = [Workload("relu", "ReLU", {"N": 1000}), Workload("dense_forward", "dense", {"N": 5, "I": 12, "J": 7})]
    monkeypatch.setattr(suites, "kernels", lambda quick: iter(two))
    monkeypatch.setitem(suites.COLUMNS, "kernels", (OURS,))
    monkeypatch.setattr(command.Run, "measure_machine", lambda self: {"flops": 1e9, "read": 1e9, "update": 1e9})
    monkeypatch.setattr(race, "MOST_ROUNDS", 3)
    return lambda *arguments: command.main(["kernels", "--quick", "--threads", "1", *map(str, arguments)])


def test_table_and_json(small_command, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert small_command("--json", path) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines() if " %" in line] == ["ReLU", "dense"]
    assert "2 of 2 rows" in printed.err
    found = json.loads(path.read_text())
    assert found["complete"] is True
    assert found["threads"] == 1
    assert [row["title"] for row in found["rows"]] == ["ReLU", "dense"]
    for row in found["rows"]:
        ours = row["candidates"]["npser"]
        assert len(ours["rounds"]) == 3
        assert min(ours["rounds"]) <= ours["quartiles"][0] <= ours["median"] <= ours["quartiles"][1]
        assert ours["difference"] <= 1e-4


def test_rows_and_candidates_can_be_left_out(small_command, monkeypatch, capsys):
    assert small_command("--rows", "dense") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " %" in line] == ["dense"]
    with pytest.raises(UserError, match="--rows sparse: no row"):
        small_command("--rows", "sparse")
    monkeypatch.setitem(suites.COLUMNS, "kernels", (OURS, JAX))
    assert small_command("--rows", "dense", "--without", "jax") == 0
    assert "JAX" not in capsys.readouterr().out  # how the list of candidates calls it
    with pytest.raises(SystemExit):
        small_command("--without", "npser")  # without us there is nothing to compare


def test_all_sections_and_growth(small_command, monkeypatch, tmp_path, capsys):
    step = Workload("train", "tiny training step, B 3", {"arch": "cnn", "B": 3, "model": TINY}, tolerance=1e-3)
    batch = Workload("infer", "tiny inference, B 6", {"arch": "cnn", "B": 6, "model": TINY})
    monkeypatch.setattr(workloads, "UPDATES", 1)
    np.savez(tmp_path / "trained.npz", windows=np.ones((3, *workloads.window_shape(step.sizes)), np.float32))
    trained = step.sizes | {"trained": str(tmp_path / "trained.npz")}
    later = Workload("train", "tiny training step, B 3, after an update", trained, tolerance=1e-3)
    monkeypatch.setattr(suites, "train", lambda quick, trained: [step, later])
    monkeypatch.setattr(suites, "infer", lambda quick, *files: [batch])
    monkeypatch.setattr(suites, "memory", lambda: [Workload("memory", "tiny", step.sizes)])
    monkeypatch.setattr(suites, "growth", lambda folder, recorded: [("tiny, against width", "8", step)])
    monkeypatch.setattr(suites, "threaded", lambda: [batch])
    monkeypatch.setattr(suites, "MEMORY", (OURS,))
    for section in ("train", "infer"):
        monkeypatch.setitem(suites.COLUMNS, section, (OURS,))
    monkeypatch.setattr(workloads, "record", lambda *arguments: None)
    monkeypatch.setattr(command.Run, "_pace", lambda self: Pace(turn=0, row=0))
    path = tmp_path / "bench.json"
    assert command.main(["--threads", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["kind"] for row in found["rows"]] == ["relu", "dense_forward", "train", "train", "infer"]
    assert found["memory"][0]["megabytes"]["npser"] > 50
    assert found["starts"][0].keys() == {"title", "cold", "warm"}
    assert {series: list(points) for series, points in found["growth"].items()} == {
        "tiny training step, against batch": ["3"],
        "tiny inference, against batch": ["6"],
        "tiny, against width": ["8"],
        "tiny inference, B 6, against threads": ["1"],
    }
    fresh = found["rows"][2]["candidates"]["npser"]["median"]
    assert found["growth"]["tiny training step, against batch"]["3"] == fresh  # not the row after updates
    out = capsys.readouterr().out
    for series, points in found["growth"].items():
        assert all(seconds > 0 for seconds in points.values())
        assert series in out
    assert command.main(["growth", "--threads", "1", "--json", str(path)]) == 0
    alone = json.loads(path.read_text())
    assert not alone["rows"]
    assert list(alone["growth"]) == list(found["growth"])[2:]


def test_a_wrong_result_is_exit_status_1(small_command, monkeypatch, capsys):
    impossible = Workload("dense_forward", "dense", {"N": 5, "I": 12, "J": 7}, tolerance=-1.0)
    monkeypatch.setattr(suites, "kernels", lambda quick: iter([impossible]))
    assert small_command() == 1
    assert "wrong: " in capsys.readouterr().out


def test_interrupted_runs_leave_what_they_measured(small_command, monkeypatch, tmp_path):
    path, rows, run = tmp_path / "bench.json", [], Race.run

    def interrupted(self, *arguments):
        if rows:
            raise KeyboardInterrupt
        rows.append(run(self, *arguments))
        return rows[0]

    monkeypatch.setattr(Race, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_command("--json", path)
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert len(found["rows"]) == 1


def test_absent_candidates_are_named(small_command, monkeypatch, capsys):
    lacking = [c for c in CANDIDATES if c is JAX]
    monkeypatch.setitem(suites.COLUMNS, "kernels", (OURS, *lacking))
    monkeypatch.setattr("bench.peers.find_spec", lambda package: None)
    assert small_command() == 0
    assert capsys.readouterr().out.count("pip install 'npser[bench]'") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["everything"],
        ["--threads", "0"],
        ["--threads", "100000"],
        ["--json", "no/such/folder/bench.json"],
        ["--rounds", "3"],
        ["growth", "--quick"],
    ],
)
def test_bad_options_get_one_line(arguments, tmp_path):
    result = run_module("bench", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("bench: ")
