"""Nothing lost: the real command, killed at any moment, resumed, and compared with a run that was left in peace.

    python -m pytest tests/test_crash.py                                a few of each kind
    NPSER_KILLS=200 python -m pytest -m slow -s tests/test_crash.py     so many, and every file operation; prints counts

Run as a program, this file is the command with a death at its n-th file operation: see `doomed`.
"""

import contextlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, run_module

from npser.corpus import user_cache
from npser.files import replacing, sweep
from npser.lock import Lock
from npser.runfolder import RunFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, mounts disks")

# The built-in corpus, one window of each utterance, the fastest network.
SHORT = ("--arch", "lstm", "--epochs", "2", "--folds", "2", "--segment-hop", "400", "--batch-size", "64")
RUN = (*SHORT, "--threads", "1")
KILLS = int(os.environ.get("NPSER_KILLS", "200"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def train(out, *more):
    """Waited for as long as it takes: the machine may be busy with something else."""
    command = [sys.executable, "-m", "npser.train", *RUN, "--out", str(out), *map(str, more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)


def start(out, *more, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "npser.train", *RUN, "--out", str(out), *map(str, more)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def contents(folder):
    """Every file of a run folder, hidden ones too, without what depends on the clock."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            text = path.read_text()
            if path.parent.name == "folds":
                json.loads(text)  # whole
            if path.parent.name == "folds" or path.name == "report.md":
                text = re.sub(r'"seconds": [0-9.e-]+|"workers": 2, |Training took \d+ s', "", text)
            files[path.relative_to(folder).as_posix()] = text
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an uninterrupted run leaves, and the seconds that it takes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, and then in children
    out = tmp_path_factory.mktemp("undisturbed")
    assert train(out / "first").returncode == 0  # compiles, and keeps the frames
    started = time.monotonic()
    result = train(out / "second")
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stderr
    files = contents(out / "second")
    assert list(files) == [".lock", "config.json", "folds/r0f0.json", "folds/r0f1.json", "predictions.csv", "report.md"]
    assert contents(out / "first") == files
    return files, seconds


def one_line(text, said=""):
    """The last line is the message: no traceback, nothing of the interpreter's."""
    lines = text.splitlines()
    assert lines, "no message"
    assert lines[-1].startswith("npser.train: "), text
    assert said in lines[-1]
    assert "Traceback" not in text, text
    assert "Exception ignored" not in text, text


def finish_and_compare(out, files):
    result = train(out)
    assert result.returncode == 0, result.stderr
    assert contents(out) == files


# --- at random moments -------------------------------------------------------------------------------------------


def interrupt(process, number, twice, moment, rng):
    """Send the signal, perhaps twice, and say how it ended: "in time", "too late", or "in the first moments"."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.send_signal(number)
    if twice:
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(number)
    _, log = process.communicate(timeout=1800)
    if process.returncode == 0:
        return "too late"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL, log
        return "in time"
    # Nothing of ours was running yet: Python itself answered, in its own way, as it read its libraries or ours.
    ours = re.search(r'npser/cli\.py", line \d+, in (?!<module>)', log)
    if not ours and (process.returncode == -number or "KeyboardInterrupt" in log):
        return "in the first moments"
    assert process.returncode == 130, log
    one_line(log, "interrupted")
    return "in time"


def kill_and_resume(folder, files, seconds, kills, seed):
    """Runs killed up to three times in a row, then resumed to the end; what happened, counted."""
    rng = random.Random(seed)
    count = Counter()
    while sum(n for (_, when), n in count.items() if when == "in time") < kills:
        out = folder / f"run{sum(count.values())}"
        for _ in range(rng.choice((1, 1, 2, 3))):
            number, twice = rng.choice(SIGNALS), rng.random() < 0.3
            began = time.monotonic()
            when = interrupt(start(out), number, twice, rng.uniform(0.02, 1) * seconds, rng)
            if when == "too late":  # the machine has less to do than when the undisturbed run was timed
                seconds = min(seconds, time.monotonic() - began)
            count[number.name + (" twice" if twice and number != signal.SIGKILL else ""), when] += 1
        finish_and_compare(out, files)
        shutil.rmtree(out)
    return count


def test_killed_at_random_moments(undisturbed, tmp_path):
    count = kill_and_resume(tmp_path, *undisturbed, kills=3, seed=os.getpid())
    assert count.total() >= 3


@pytest.mark.slow
def test_killed_at_many_random_moments(undisturbed, tmp_path, capsys):
    count = kill_and_resume(tmp_path, *undisturbed, kills=KILLS, seed=2016)
    with capsys.disabled():
        print("\nkilled at random moments, resumed, compared:")
        for (what, when), n in sorted(count.items()):
            print(f"  {what}: {n} {when}")


def test_an_interruption_that_becomes_another_error_is_one():
    """A class's attributes, being named as it is imported, turn KeyboardInterrupt into RuntimeError."""
    script = """if True:
        import os, signal, time
        from npser.cli import run
        def main():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            except KeyboardInterrupt as error:
                raise RuntimeError("Error calling __set_name__") from error
        run("npser.train", main)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stderr) == (130, "npser.train: interrupted\n")


# --- at every file operation -------------------------------------------------------------------------------------


def doomed(number, signal_number, watched, *arguments):
    """The command, with a signal to itself just before the n-th operation on a file below the folder `watched`."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or args[1] in ("r", "rb"):
            return
        if any(isinstance(part, str | Path) and os.path.abspath(part).startswith(watched) for part in args[:2]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal_number)

    sys.argv = ["npser.train", *arguments]
    sys.addaudithook(watch)
    try:
        runpy.run_module("npser.train", run_name="__main__", alter_sys=True)
    finally:
        if number == 0:
            print(f"{seen} operations", file=sys.stderr)


def run_doomed(number, signal_number, watched, *arguments):
    command = [sys.executable, __file__, str(number), str(int(signal_number)), str(watched), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)


def operations(watched, *arguments):
    """How many file operations there are to die at."""
    result = run_doomed(0, 0, watched, *arguments)
    assert result.returncode == 0, result.stderr
    return int(re.search(r"(\d+) operations", result.stderr)[1])


def die_at(number, signal_number, out, files):
    result = run_doomed(number, signal_number, out, *RUN, "--out", out)
    if signal_number == signal.SIGKILL:
        assert result.returncode == -signal.SIGKILL
    else:
        assert result.returncode == 130, result.stderr
        one_line(result.stderr, "interrupted")
        assert not list(out.rglob("*.tmp"))
    finish_and_compare(out, files)
    shutil.rmtree(out)


def test_killed_at_some_file_operations(undisturbed, tmp_path):
    total = operations(tmp_path, *RUN, "--out", tmp_path / "counted")
    assert total > 15  # config.json, two checkpoints, two folds, twice two tables: each opened and renamed
    rng = random.Random(os.getpid())
    for number, signal_number in zip(rng.sample(range(1, total + 1), 2), SIGNALS, strict=False):
        die_at(number, signal_number, tmp_path / "out", undisturbed[0])


@pytest.mark.slow
def test_killed_at_every_file_operation(undisturbed, tmp_path, capsys):
    total = operations(tmp_path, *RUN, "--out", tmp_path / "counted")
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        for number in range(1, total + 1):
            die_at(number, signal_number, tmp_path / "out", undisturbed[0])
    with capsys.disabled():
        print(f"\nkilled at each of {total} file operations, by SIGKILL and by SIGTERM, resumed, compared")


def test_a_model_is_saved_whole_or_not_at_all(undisturbed, tmp_path):
    folder, out = tmp_path / "saved", tmp_path / "run"
    model = folder / "m.npz"
    folder.mkdir()
    command = ("--arch", "lstm", "--cv", "none", "--epochs", "1", *RUN[6:], "--save", model, "--out", out)
    total = operations(folder, *command)
    assert total == 2  # the temporary file is made, and renamed
    whole = model.read_bytes()
    for number in range(1, total + 1):
        model.write_bytes(b"the model before")
        assert run_doomed(number, signal.SIGKILL, folder, *command).returncode == -signal.SIGKILL
        assert model.read_bytes() == b"the model before"
    assert len(list(folder.iterdir())) == 2  # the last kill left a temporary file
    again = run_module("npser.train", *command)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in folder.iterdir()] == ["m.npz"]
    assert len(model.read_bytes()) == len(whole)


# --- two at once -------------------------------------------------------------------------------------------------


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert path.exists()


def test_a_second_run_in_the_same_folder_is_refused(undisturbed, tmp_path):
    out = tmp_path / "out"
    first = start(out, "--epochs", "400")
    wait_for(out / "config.json", first)
    for more in ((), ("--only", "0.1")):
        second = train(out, "--epochs", "400", *more)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        one_line(second.stderr, "another npser.train is computing")
    first.kill()
    first.communicate()
    shutil.rmtree(out / "folds")
    (out / "config.json").unlink()
    finish_and_compare(out, undisturbed[0])  # the lock of the dead is no obstacle


def test_different_folds_may_be_computed_at_once_in_one_folder(undisturbed, tmp_path):
    out = tmp_path / "out"
    both = [start(out, "--only", f"0.{fold}") for fold in (0, 1)]
    for process in both:
        _, log = process.communicate(timeout=1800)
        assert process.returncode == 0, log
    assert contents(out) == undisturbed[0]
    one = start(tmp_path / "other", "--only", "0.1", "--epochs", "400")
    wait_for(tmp_path / "other" / "config.json", one)
    try:
        for more in (("--only", "0.1"), ()):
            one_line(train(tmp_path / "other", "--epochs", "400", *more).stderr, "another npser.train is computing")
    finally:
        one.kill()
        one.communicate()


def spawned_by(pid):
    """The worker processes of a process."""
    with contextlib.suppress(OSError):  # one of them ended meanwhile
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    return []


def test_workers_end_with_a_killed_parent(tmp_path):
    """They would compute on beside the run that is resumed, or wait for work for ever."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("NUMBA_NUM_THREADS", None)
    command = [sys.executable, "-m", "npser.train", *SHORT, "--epochs", "400", "--workers", "2", "--out", str(out)]
    # SIGINT also while the workers are starting: they cannot answer it yet.
    for ended_by, within in ((signal.SIGKILL, 3), (signal.SIGINT, 3), (signal.SIGINT, 0.5)):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        wait_for(out / "config.json", run)
        workers = []
        while len(workers) < 2 and run.poll() is None:
            workers = spawned_by(run.pid)
        time.sleep(random.uniform(0, within))
        if ended_by == signal.SIGINT:  # as a terminal sends it, to all
            os.killpg(run.pid, signal.SIGINT)
        else:
            run.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        _, log = run.communicate(timeout=60)
        assert run.returncode == (130 if ended_by == signal.SIGINT else -signal.SIGKILL), log
        if run.returncode == 130:
            one_line(log, "interrupted")


# --- full disk, read-only folder, folder gone --------------------------------------------------------------------


def on_a_small_disk(script, tmp_path):
    """A shell script with a memory disk of its own mounted at $disk, where the system lets ordinary users have one."""
    (tmp_path / "disk").mkdir()
    able = (
        subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    if able is None or able.returncode:
        pytest.skip("needs unshare(1) and user name spaces")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "disk": str(tmp_path / "disk"), "tmp": str(tmp_path)}
    environment["train"] = " ".join([sys.executable, "-m", "npser.train", *RUN, "--out", f"{tmp_path}/disk/out"])
    command = ["unshare", "-Urm", "sh", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)


def fill(size, folder, files):
    """A run on a disk of so many KB, and once more with room enough; returns the first status."""
    done = on_a_small_disk(
        f"""mount -t tmpfs -o size={size}k tmpfs $disk || exit 99
        $train >$tmp/stdout 2>$tmp/stderr; echo $?
        find $disk -name '*.tmp'
        mount -o remount,size=20m $disk
        $train >$tmp/stdout2 2>$tmp/stderr2; echo $?
        cp -r $disk/out $tmp/copy""",
        folder,
    )
    first, *rest = done.stdout.splitlines()
    assert rest == ["0"], (done.stdout, done.stderr, (folder / "stderr2").read_text())
    assert contents(folder / "copy") == files
    if first != "0":
        assert first == "1"
        one_line((folder / "stderr").read_text(), "No space left on device")
    return first


@pytest.mark.parametrize("size", [1000, 3150])
def test_full_disk(undisturbed, tmp_path, size):
    """Too small for a checkpoint, for a fold beside its checkpoint."""
    assert fill(size, tmp_path, undisturbed[0]) == "1"


@pytest.mark.slow
def test_many_full_disks(undisturbed, tmp_path, capsys):
    sizes = sorted({*range(4, 64, 8), *range(64, 3600, 250), *range(3200, 3600, 32)})
    statuses = Counter()
    for size in sizes:
        folder = tmp_path / str(size)
        folder.mkdir()
        statuses[fill(size, folder, undisturbed[0])] += 1
    with capsys.disabled():
        print(f"\n{len(sizes)} disks of {sizes[0]} to {sizes[-1]} KB: {statuses['1']} full, {statuses['0']} enough")


def test_read_only_folder(undisturbed, tmp_path):
    done = on_a_small_disk(
        """mount -t tmpfs tmpfs $disk || exit 99; mount -o remount,ro $disk
        $train; echo $?; mount -o remount,rw $disk; mkdir $disk/out; mount -o remount,ro $disk; $train; echo $?""",
        tmp_path,
    )
    assert done.stdout.split() == ["2", "2"], done.stderr
    assert done.stderr.count("\n") == 2
    one_line(done.stderr, "Read-only file system")


def remove_while_running(out, moment, files):
    process = start(out)
    wait_for(out / "config.json", process)
    time.sleep(moment)
    while out.exists():
        shutil.rmtree(out, ignore_errors=True)
    _, log = process.communicate(timeout=1800)
    assert process.returncode in (0, 1), log  # 0: it was over
    if process.returncode:
        one_line(log, "run the same command again")
    assert not out.exists()
    finish_and_compare(out, files)
    shutil.rmtree(out)
    return process.returncode


def test_folder_removed_while_running(undisturbed, tmp_path):
    assert remove_while_running(tmp_path / "out", 0, undisturbed[0]) == 1


@pytest.mark.slow
def test_folder_removed_at_many_moments(undisturbed, tmp_path, capsys):
    files, seconds = undisturbed
    statuses = Counter(remove_while_running(tmp_path / "out", n * seconds / 20, files) for n in range(20))
    with capsys.disabled():
        print(f"\nfolder removed while running: {statuses[1]} times answered by one line, {statuses[0]} too late")


# --- the parts ---------------------------------------------------------------------------------------------------


def test_only_temporary_files_of_ones_own_kind_are_removed(tmp_path):
    names = [".r0f0.json.0123abcd.tmp", ".r1f0.json.0123abcd.tmp", ".r0f0.json.short.tmp", "r0f0.json.0123abcd.tmp"]
    for name in [*names, ".r0f0.json"]:
        (tmp_path / name).write_text("")
    (tmp_path / ".r0f0.json.00000000.tmp").mkdir()
    (tmp_path / ".r0f0.json.00000001.tmp").symlink_to(tmp_path / ".r0f0.json")
    sweep(tmp_path, re.compile(r"r0f0\.json"), older_than=3600)
    assert len(list(tmp_path.iterdir())) == 7
    sweep(tmp_path, re.compile(r"r0f0\.json"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[1:], ".r0f0.json", ".r0f0.json.00000000.tmp", ".r0f0.json.00000001.tmp"}
    sweep(tmp_path / "missing", re.compile(".*"))


def test_a_link_is_kept_and_a_device_not_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError), replacing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


CONFIG = {"labels": ["a", "b"], "vote": "sum", "arch": "lstm"}


def test_leftovers_are_removed_by_whoever_locks_what_they_were_to_become(tmp_path):
    RunFolder.open_or_create(tmp_path, CONFIG)
    folds = [f".r{r}f{f}.{kind}.0123abcd.tmp" for r in (0, 1) for f in (0, 1) for kind in ("json", "checkpoint.npz")]
    for name in folds:
        (tmp_path / "folds" / name).write_text("")
    (tmp_path / ".report.md.0123abcd.tmp").write_text("")
    RunFolder.open_or_create(tmp_path, CONFIG, only=(1, 0))
    assert {path.name for path in (tmp_path / "folds").iterdir()} == {n for n in folds if not n.startswith(".r1f0")}
    assert not list(tmp_path.glob("*.tmp"))
    RunFolder.open_or_create(tmp_path, CONFIG)
    assert not list((tmp_path / "folds").iterdir())


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("npser.lock._fcntl", type("none", (), {"lockf": lockf, "LOCK_EX": 2, "LOCK_NB": 4}))
    with Lock(tmp_path, None).shared_files():
        pass
    assert (
        capsys.readouterr().err
        == "no locks on this file system (Operation not supported): nothing refuses a second run\n"
    )


def test_old_frames_of_killed_programs_are_removed_from_the_cache(tmp_path, monkeypatch, tones):
    from npser.corpus import open_corpus
    from npser.frontend import read_frames

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    user_cache().mkdir()
    old, new = (user_cache() / f".frames-{32 * c}.npz.0123abcd.tmp" for c in "01")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    read_frames(open_corpus(str(tones)), "reference")
    assert not old.exists()
    assert new.exists()  # somebody may be writing it


if __name__ == "__main__":
    doomed(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_python_drops_is_answered_all_the_same(tones, tmp_path, number):
    """What is raised while an object is destroyed is printed and forgotten."""
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from npser import cli, progress, train

class Dying:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        for _ in range(1000):
            pass

step = progress.Progress.step
seen = []
def stepped(self, *arguments, **named):
    seen.append(None)
    if len(seen) == 5:
        Dying()
    return step(self, *arguments, **named)
progress.Progress.step = stepped
sys.argv[1:] = ["--arch", "lstm", "--data", {str(tones)!r}, "--folds", "2", "--epochs", "2000", "--segment-hop", "40",
                "--out", {str(tmp_path / "out")!r}]
cli.run("npser.train", train.main)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "Exception ignored" in done.stderr
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "npser.train: interrupted"
