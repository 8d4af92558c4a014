"""Folds in several processes: the same results as one after the other, whoever computes them and whoever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from conftest import ROOT, run_module

from npser import train, workers
from npser.corpus import open_corpus
from npser.errors import RunFailed, UserError
from npser.foldresult import fold_result
from npser.runconfig import audio_sha256, listing_sha256
from npser.runfolder import RunFolder

SHORT = ("--arch", "lstm", "--folds", "3", "--repeats", "1", "--epochs", "2", "--segment-hop", "40", "--threads", "1")


def numbers(out):
    """Every fold without what depends on the clock and the machine."""
    folds = {}
    for path in sorted((out / "folds").glob("*.json")):
        folds[path.name] = fold = json.loads(path.read_text())
        del fold["run"]
        for epoch in fold["epochs"]:
            del epoch["seconds"]
    return folds


def test_two_processes_give_what_one_gives(tones, tmp_path, capfd):
    alone = run_module("npser.train", *SHORT, "--data", tones, "--out", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    config = RunFolder.open(tmp_path / "one").config
    folder = RunFolder.open_or_create(tmp_path / "two", config)
    checkpoint = folder.checkpoint_path(0, 1)
    checkpoint.write_bytes(b"damaged")
    jobs = [
        workers.Job(str(tones), None, config, 0, fold, str(checkpoint) if fold == 1 else None, {"threads": 1}, 1)
        for fold in range(3)
    ]
    workers.run_locally(jobs, folder, 2)
    assert "r0f1.checkpoint.npz cannot be used" in capfd.readouterr().err  # said by the worker
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    assert len(numbers(tmp_path / "two")) == 3
    assert not list((tmp_path / "two").rglob("*checkpoint*"))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_the_command_divides_its_threads(tones, tmp_path):
    result = run_module(
        "npser.train", *SHORT[:-1], "2", "--data", tones, "--out", tmp_path / "out", "--workers", "2", "--no-checkpoint"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(" done in ") == 3
    assert "3 of 3" in result.stderr
    fold = json.loads((tmp_path / "out" / "folds" / "r0f0.json").read_text())
    assert (fold["run"]["workers"], fold["run"]["threads"]) == (2, 1)


CONFIG = {"labels": ["a", "b"], "vote": "sum", "arch": "lstm"}


def job(fold):
    return workers.Job("demo", None, CONFIG, 0, fold, None, {})


def a_result(fold):
    return fold_result(
        repeat=0, fold=fold, labels=["a", "b"], vote="sum", epochs=[], files=[f"{fold}.wav"], speakers=["x"], truth=[0],
        probabilities=[(0.9, 0.1)], majority=[0], run={},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return RunFolder.open_or_create(tmp_path / "run", CONFIG)


def test_any_executor_will_do(folder, monkeypatch):
    monkeypatch.setattr(workers, "compute", lambda job: a_result(job.fold))
    with ThreadPoolExecutor(2) as executor:
        workers.run_folds(executor, [job(n) for n in range(5)], folder, lambda: 2)
    assert folder.finished() == [(0, n) for n in range(5)]


def test_a_failing_fold_ends_the_run_and_the_finished_ones_are_kept(folder, monkeypatch):
    begun = []

    def compute(job):
        begun.append(job.fold)
        if job.fold == 2:
            raise RunFailed("fold 0.2: diverged")
        return a_result(job.fold)

    monkeypatch.setattr(workers, "compute", compute)
    with ThreadPoolExecutor(1) as executor, pytest.raises(RunFailed, match=r"fold 0\.2: diverged"):
        workers.run_folds(executor, [job(n) for n in range(6)], folder, lambda: 1)
    assert folder.finished() == [(0, 0), (0, 1)]
    assert begun == [0, 1, 2]


def test_folds_at_work_beside_a_failing_one_are_kept(folder, monkeypatch, capsys):
    told, say = threading.Event(), workers._say
    monkeypatch.setattr(workers, "_say", lambda line: (say(line), told.set()))

    def compute(job):
        if job.fold == 0:
            raise RunFailed("fold 0.0: diverged")
        assert told.wait(60)
        return a_result(job.fold)

    monkeypatch.setattr(workers, "compute", compute)
    with ThreadPoolExecutor(2) as executor, pytest.raises(RunFailed, match=r"fold 0\.0: diverged"):
        workers.run_folds(executor, [job(n) for n in range(6)], folder, lambda: 2)
    assert folder.finished() == [(0, 1)]
    said = capsys.readouterr().err
    assert "fold 0.0 failed; 1 fold at work is" in said
    assert "; 1 of 6" in said


def test_workers_that_join_get_folds(folder, monkeypatch):
    there, together = [1], threading.Barrier(3)

    def compute(job):
        if job.fold == 0:
            there[0] = 3
        else:
            together.wait(60)  # three are at work
        return a_result(job.fold)

    monkeypatch.setattr(workers, "compute", compute)
    with ThreadPoolExecutor(3) as executor:
        workers.run_folds(executor, [job(n) for n in range(4)], folder, lambda: there[0])
    assert folder.finished() == [(0, n) for n in range(4)]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of single threads are POSIX")
def test_a_signal_that_another_thread_was_given_ends_the_run(folder, monkeypatch):
    """As happens to a run that was stopped (Ctrl-Z), and then killed."""
    ended, in_time = threading.Event(), []

    class Signalled(BaseException):
        pass

    def compute(job):
        time.sleep(0.5)  # the main thread waits by now
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        in_time.append(ended.wait(30))
        return a_result(job.fold)

    def answer(number, frame):
        raise Signalled

    monkeypatch.setattr(workers, "compute", compute)
    monkeypatch.setattr(workers, "LOOK_EVERY", 0.1)
    before = signal.signal(signal.SIGUSR1, answer)
    try:
        with ThreadPoolExecutor(1) as executor:
            with pytest.raises(Signalled):
                workers.run_folds(executor, [job(0)], folder, lambda: 1)
            ended.set()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert in_time == [True]


def return_or_stay(job):
    """In a spawned process: fold 1 goes on after the other's result was lost, and leaves a mark when it is let."""
    lost = Path(os.environ["NPSER_TEST_MARK"])
    if job.fold == 1:
        while not lost.exists():
            time.sleep(0.01)
        time.sleep(5)
        lost.with_name("stayed").touch()
    return a_result(job.fold)


def test_workers_whose_results_nobody_would_take_are_ended(folder, tmp_path, monkeypatch):
    def full(*_):
        (tmp_path / "lost").touch()
        raise RunFailed("no space left")

    monkeypatch.setenv("NPSER_TEST_MARK", str(tmp_path / "lost"))
    monkeypatch.setattr(workers, "compute", return_or_stay)
    monkeypatch.setattr(RunFolder, "save_fold", full)
    with pytest.raises(RunFailed, match="no space left"):
        workers.run_locally([job(n) for n in range(2)], folder, 2)
    assert not (tmp_path / "stayed").exists()


def die_once(job):
    """In a spawned process: fold 1 kills its worker the first time."""
    mark = os.environ["NPSER_TEST_MARK"]
    if job.fold == 1 and not os.path.exists(mark):
        with open(mark, "w"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return a_result(job.fold)


def test_a_killed_worker_costs_its_fold_only(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NPSER_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(workers, "compute", die_once)  # sent to the workers by name
    workers.run_locally([job(n) for n in range(4)], folder, 2)
    assert folder.finished() == [(0, n) for n in range(4)]
    first, *_, last = lines = capsys.readouterr().err.splitlines()
    assert first == "4 folds for 2 workers on this machine; a line for each that is done"
    assert sum("a worker died" in line for line in lines) == 1
    assert last.endswith("; 4 of 4")


def blocked():
    """Signals that are kept from the thread that asks."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked here")
def test_workers_never_hear_of_an_interruption():
    """Not even while they start, when Python itself would answer with a traceback; the parent hears of it."""
    before = blocked()
    with workers.spawned(2) as executor:
        masks = [executor.submit(blocked) for _ in range(2)]
        started = set(executor._processes)
        assert blocked() == before
        assert all(signal.SIGINT in mask.result() for mask in masks)
        assert len(started) == 2


def test_workers_that_die_again_and_again_end_the_run(folder):
    class Broken(ThreadPoolExecutor):
        def submit(self, *arguments):
            raise BrokenProcessPool("dead")

    with pytest.raises(RunFailed, match="workers died 3 times"):
        workers.run_locally([job(0)], folder, 2, Broken)


def test_wrong_use(tones, tmp_path):
    base = ["--arch", "lstm", "--data", str(tones), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="they share 1 thread: use"):
        train.main([*base, "--threads", "1", "--workers", "2"])
    with pytest.raises(UserError, match="no folds with --cv none"):
        train.main([*base, "--cv", "none", "--workers", "2"])


@pytest.mark.parametrize(("key", "said"), [("utterances_sha256", "other utterances"), ("audio_sha256", "other rec")])
def test_a_worker_that_finds_other_data_says_so(tones, key, said):
    corpus = open_corpus(str(tones))
    config = {"backend": "cpu", "precision": "float32", "training": {"speeds": []}}
    config |= {"utterances_sha256": listing_sha256(corpus), "audio_sha256": audio_sha256(corpus), key: "0"}
    with pytest.raises(UserError, match=said):
        workers.compute(workers.Job(str(tones), None, config, 0, 0, None, {}))


# --- dask.distributed, with a real scheduler -------------------------------------------------------------------------


class Cluster:
    """A scheduler and workers, each a process of its own, on this machine."""

    def __init__(self, folder, environment):
        self.environment, self.address_file = environment, folder / "scheduler.json"
        self.processes = [self._start("scheduler", "--port", "0", "--no-dashboard", "--scheduler-file")]
        deadline = time.monotonic() + 120
        while not self.address_file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.2)  # until it is written whole
        self.address = json.loads(self.address_file.read_text())["address"]

    def _start(self, what, *options):
        command = [sys.executable, "-m", "distributed.cli.dask_" + what, *options, str(self.address_file)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def worker(self, threads="1"):
        options = ("--nthreads", threads, "--no-nanny", "--no-dashboard", "--scheduler-file")
        self.processes.append(self._start("worker", *options))
        return self.processes[-1]

    def wait_for(self, workers):
        from distributed import Client

        with Client(self.address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip("distributed", reason="needs pip install 'npser[dask]'")
    cluster = Cluster(tmp_path, os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    yield cluster
    for process in cluster.processes:
        process.kill()
        process.wait()


def test_dask_with_a_worker_killed_half_way_gives_what_one_process_gives(cluster, tones, tmp_path):
    alone = run_module("npser.train", *SHORT, "--data", tones, "--out", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    victim, _ = cluster.worker(), cluster.worker()
    cluster.wait_for(2)
    command = [sys.executable, "-m", "npser.train", *SHORT, "--data", tones, "--out", tmp_path / "two"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([*command, "--dask", cluster.address], env=environment, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if " done in " in line:  # the first fold is there, the others are at work
            victim.send_signal(signal.SIGKILL)
            break
    rest = run.stderr.read()
    assert run.wait(timeout=300) == 0, rest
    assert victim.wait() == -signal.SIGKILL
    assert len(numbers(tmp_path / "two")) == 3
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "folds" / "r0f0.json").read_text())["run"]["workers"] == 2


def test_a_cluster_that_has_lost_its_workers_is_named_and_the_next_one_goes_on(cluster, tones, tmp_path):
    victim = cluster.worker()
    cluster.wait_for(1)
    command = [sys.executable, "-m", "npser.train", *SHORT, "--data", tones, "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([*command, "--dask", cluster.address], env=environment, stderr=subprocess.PIPE, text=True)
    deserted, patience = 0, threading.Timer(240, run.kill)
    patience.start()
    for line in run.stderr:
        if " for 1 worker on " in line:
            victim.kill()
        if line.startswith("no worker is left on"):
            deserted += 1
            cluster.worker()
    patience.cancel()
    assert run.wait(timeout=300) == 0
    assert deserted == 1
    assert len(numbers(tmp_path / "out")) == 3


def test_dask_that_cannot_be_used(cluster, tones, tmp_path):
    base = ["--arch", "lstm", "--data", str(tones), "--out", str(tmp_path / "o"), "--threads", "1", "--folds", "2"]
    with pytest.raises(UserError, match="no worker is connected"):
        train.main([*base, "--dask", cluster.address])
    cluster.worker(threads="2")
    cluster.wait_for(1)
    with pytest.raises(UserError, match="--nthreads 1"):
        train.main([*base, "--dask", cluster.address])


def test_a_worker_without_npser_is_named(cluster, tones, tmp_path):
    """It would die of the first fold, and so would the next one that is given it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.modules['npser'] = None")
    cluster.environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    cluster.worker()
    cluster.wait_for(1)
    base = ["--arch", "lstm", "--data", str(tones), "--out", str(tmp_path / "o"), "--threads", "1", "--folds", "2"]
    with pytest.raises(UserError, match=r"the worker tcp://.* has no npser"):
        train.main([*base, "--dask", cluster.address])


def test_a_lost_scheduler_is_one_line(cluster, tones, tmp_path):
    cluster.worker()
    cluster.wait_for(1)
    command = [sys.executable, "-m", "npser.train", *SHORT, "--data", tones, "--out", tmp_path / "o"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    run = subprocess.Popen([*command, "--dask", cluster.address], env=environment, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if " for 1 worker on " in line:
            cluster.processes[0].kill()
            break
    rest = run.stderr.read().splitlines()
    assert run.wait(timeout=300) == 1, rest
    assert rest[-1].startswith(f"npser.train: --dask {cluster.address}: the scheduler is gone")
    assert len(rest) == 1, rest


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("somewhere", "missing port number"),
        ("bad://127.0.0.1:1", "unknown address scheme"),
        ("tls://127.0.0.1:1", "TLS expects"),
        ("", "no address given"),
    ],
)
def test_an_address_where_no_scheduler_is(tones, tmp_path, address, said):
    """One line: a Client of distributed that finds nobody adds tracebacks of its own."""
    pytest.importorskip("distributed", reason="needs pip install 'npser[dask]'")
    result = run_module("npser.train", *SHORT, "--data", tones, "--out", tmp_path / "o", "--dask", address)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("npser.train: --dask")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_is_done_asks_for_no_scheduler(tones, tmp_path):
    command = ("npser.train", *SHORT, "--data", tones, "--out", tmp_path / "o")
    assert run_module(*command).returncode == 0
    again = run_module(*command, "--dask", "tcp://127.0.0.1:9")
    assert (again.returncode, again.stderr) == (0, "")
    assert "3 of 3 folds are finished already" in again.stdout


def test_without_dask(tones, tmp_path, monkeypatch):
    base = ["--arch", "lstm", "--data", str(tones), "--out", str(tmp_path / "o"), "--folds", "2"]
    with pytest.raises(UserError, match="leave --workers away"):
        train.main([*base, "--workers", "2", "--dask", "tcp://127.0.0.1:9"])
    with pytest.raises(UserError, match="there are no folds"):
        train.main([*base, "--cv", "none", "--dask", "tcp://127.0.0.1:9"])
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'npser\[dask\]'"):
        train.main([*base, "--dask", "tcp://127.0.0.1:9"])
