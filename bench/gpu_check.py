"""python bench/gpu_check.py: everything that only a GPU can tell, in one call.

Run it from the repository's root, on a machine with an NVIDIA GPU, numpy, numba, numba-cuda and scipy, which may lie in
a folder on PYTHONPATH; nothing has to be installed; soundfile, PyTorch, JAX and compute-sanitizer may be missing. In
this order, within --time seconds:

- launching: how kernels are compiled and launched, and how long that takes; where launching through the driver fails,
  or is not possible, that is a disagreement, and everything after it goes through Numba's launcher;
- parity: every operation at the paper's sizes against the reference, in float32 and TF32; the losses of ten training
  steps of each network beside the cpu's;
- bench: `python -m bench --device cuda` of training steps, inference and kernels, beside PyTorch and JAX: about ten
  minutes, so that `--only` for the sections that matter most, and a second call, are worth a thought;
- sanitizer: small operations under compute-sanitizer (memcheck, racecheck, synccheck), where it is found;
- cross-validation of lstm, cnn and tdcnn on the recordings in --wavs, for as long as is left.

    python bench/gpu_check.py --out results --wavs path/to/emodb --time 570
    python bench/gpu_check.py --out more --wavs path/to/emodb --time 570 --resume results     # goes on from there

OUT then holds five files: gpu_check.json, with the results of every section as soon as it is over (bench's rows too),
the run folders as archives, which grow with every fold, and a log. A call that is ended early loses the section that it
was in, and goes on behind the others with --resume. Every section runs in a process of its own, so that a fault in one
leaves the others alone. `--dry` tries the program itself, in Numba's simulator (NUMBA_ENABLE_CUDASIM=1).

Exit status: 0 if everything agreed, 1 if something did not or a section failed, 2 without a GPU.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARCHITECTURES = ("lstm", "cnn", "tdcnn")
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3}  # largest difference, relative to the largest number
LOSS_TOLERANCE = 1e-4
Results = dict[str, Any]

# The paper's sizes at batch 32, and odd ones. Rows, inputs, outputs of dense products; B, T, H of LSTM layers; B, T, F,
# C, O of convolution blocks.
DENSE = {
    "cnn dense1": (32, 32768, 1024),
    "lstm inputs": (4096, 128, 512),
    "tdcnn lstm1": (128, 32768, 4096),
    "out": (32, 1024, 7),
    "odd": (77, 301, 203),
}
LSTMS = {"H 128": (32, 128, 128), "H 1024": (32, 4, 1024), "odd": (5, 7, 77)}
BLOCKS = {"block 1": (32, 128, 128, 1, 32), "block 2": (32, 64, 64, 32, 32), "odd": (3, 33, 47, 5, 37)}
ALONE = (4, 37, 41, 9, 13)  # a convolution without ReLU and pooling
PAPER_BATCH, STEPS = 32, 10
NETWORK: dict[str, Any] = {}  # options of build_model: the paper's sizes

# For compute-sanitizer, which is slow, and for the simulator, which is much slower.
SMALL_DENSE = {"odd": (37, 301, 203), "in fours": (132, 64, 260)}
SMALL_LSTMS = {"narrow": (2, 3, 77), "wide": (3, 2, 132)}
SMALL_BLOCKS = {"block 1": (2, 33, 35, 1, 33), "block 2": (2, 18, 20, 12, 36)}
TINY_DENSE, TINY_LSTMS = {"odd": (2, 9, 3), "in fours": (4, 8, 4)}, {"narrow": (2, 2, 2), "wide": (2, 2, 5)}
TINY_BLOCKS = {"block 1": (1, 4, 4, 1, 2), "block 2": (1, 4, 4, 2, 2)}


def shrink(dense: dict[str, Any], lstms: dict[str, Any], blocks: dict[str, Any], network: dict[str, Any]) -> None:
    """Other sizes than the paper's, in this process."""
    global DENSE, LSTMS, BLOCKS, ALONE, PAPER_BATCH, STEPS, NETWORK
    DENSE, LSTMS, BLOCKS, ALONE, PAPER_BATCH, STEPS, NETWORK = dense, lstms, blocks, (1, 3, 4, 2, 3), 2, 2, network


# --- launching ---------------------------------------------------------------------------------------------------


def check_launching() -> Results:
    """One small operation, and what a launch costs: microseconds of this program's, and of the device's."""
    import numpy as np

    import kernels
    from kernels.cuda import arrays, device, launching, lstm

    started = time.perf_counter()
    k = kernels.rung("cuda")
    x = np.arange(-4, 4, dtype=np.float32)
    there = arrays.asarray(x)
    agrees = bool(np.array_equal(arrays.asnumpy(k.relu_forward(there)), np.maximum(x, 0)))
    results: Results = {"agrees": agrees, "by the driver": device.DIRECT, "gpu": k.device_name()}
    results["libraries"] = launching.libraries()
    if not device.DIRECT:  # Numba launches: slower, and with less shared memory; not what is to be measured
        chosen = device.SIMULATED or "KERNELS_CUDA_LAUNCHER" in device.OBSTACLE
        results["not by the driver"] = {"because": device.OBSTACLE, "agrees": chosen}
    results["seconds to the first result"] = round(time.perf_counter() - started, 2)
    # Below 48 KB plus a little, the driver has granted no more: see kernels.cuda.lstm.
    results["shared memory of lstm_sequence"] = lstm.sequence_memory(lstm._lstm_sequence, lstm.SEQUENCE_UNITS)[2]
    count = 10 if device.SIMULATED else 2000
    started = time.perf_counter()
    for _ in range(count):
        k.relu_forward(there)
    launched = time.perf_counter() - started
    device.synchronise()
    taken = time.perf_counter() - started
    return results | {"microseconds to launch": 1e6 * launched / count, "microseconds in all": 1e6 * taken / count}


# --- parity ------------------------------------------------------------------------------------------------------


def check_operations(precision: str) -> Results:
    """Every operation at the paper's sizes against the reference, which computes in float64 from the same numbers."""
    import numpy as np

    import kernels
    from kernels import host, reference
    from kernels.cuda import arrays

    k = kernels.rung("cuda")
    k.settings.precision = precision
    rng = np.random.default_rng(0)
    results: Results = {}

    def numbers(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    def wide(value: Any) -> Any:
        return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value

    def compare(title: str, name: str, *operands: Any, **options: Any) -> list[Any]:
        """An operation, or what only moves numbers (`kernels.host`). Returns the device's results as NumPy arrays."""
        there = [arrays.asarray(value) if isinstance(value, np.ndarray) else value for value in operands]
        ours, theirs = (k, reference) if hasattr(reference, name) else (arrays, host)
        got = getattr(ours, name)(*there, **options)
        truth = getattr(theirs, name)(*map(wide, operands), **options)
        pairs = list(zip(_listed(got), _listed(truth), strict=True))
        found = [None if g is None else arrays.asnumpy(g) for g, _ in pairs]
        judge(f"{name} {title}", [(v, true) for v, (_, true) in zip(found, pairs, strict=True) if v is not None])
        return found

    def change(title: str, name: str, operands: Sequence[Any], changed: int, *options: float) -> None:
        """An operation that changes so many of its operands, the last ones."""
        there, true = [arrays.asarray(value) for value in operands], [wide(value) for value in operands]
        getattr(k, name)(*there, *options)
        getattr(reference, name)(*true, *options)
        judge(f"{name} {title}", list(zip(map(arrays.asnumpy, there[-changed:]), true[-changed:], strict=True)))

    def judge(name: str, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Record the largest error of (result, truth); what is not finite is infinitely wrong."""
        errors = [0.0]
        for value, true in pairs:
            if value.dtype == np.uint8:  # places of maxima: two nearly equal ones may change places
                errors.append(float(np.mean(value != true)))
            elif not (np.isfinite(value).all() and np.isfinite(true).all()):
                errors.append(np.inf)
            else:
                errors.append(float(np.abs(value - true).max() / max(1e-30, np.abs(true).max())))
        results[name] = {"error": max(errors), "agrees": max(errors) <= TOLERANCE[precision]}
        print(json.dumps(results), flush=True)  # so that what comes next can spoil nothing

    for title, (N, I, J) in DENSE.items():
        x, w, b, dy = numbers(N, I), numbers(I, J), numbers(J), numbers(N, J)
        compare(title, "dense_forward", x, w, b)
        compare(title, "dense_backward_input", dy, w)
        compare(title, "dense_backward_weights", x, dy)
        compare(title, "dense_backward_bias", dy)
        change(title, "dense_update_weights", (x, dy, w, numbers(I, J)), 2, 0.01, 0.8)
    for title, (B, T, H) in LSTMS.items():
        z, wh, dh = numbers(B, T, 4 * H), numbers(H, 4 * H) / np.float32(H**0.5), numbers(B, T, H)
        _, c, gates = compare(title, "lstm_forward", z, wh)
        compare(title, "lstm_backward", dh, gates, c, wh)
        compare(title, "lstm_inference", numbers(B, T, 128), numbers(128, 4 * H) / np.float32(128**0.5), wh, z[0, 0])
    if precision != "float32":
        return results  # nothing else depends on it
    for title, (B, T, F, C, O) in BLOCKS.items():
        x, w, b = numbers(B, T, F, C), numbers(3, 3, C, O), numbers(O)
        y, argmax = compare(title, "conv_relu_pool_forward", x, w, b)
        compare(title, "conv_relu_pool_backward", numbers(*y.shape), argmax, x, w)
        compare(title, "relu_backward", numbers(*y.shape), *compare(title, "relu_forward", numbers(*y.shape)))
        y, argmax = compare(title, "maxpool2x2_forward", x)
        compare(title, "maxpool2x2_backward", numbers(*y.shape), argmax, x_shape=x.shape)
        change(title, "sgd_update", (w, numbers(*w.shape), numbers(*w.shape)), 3, 0.01, 0.8)
    B, T, F, C, O = ALONE
    x, w = numbers(B, T, F, C), numbers(3, 3, C, O)
    compare("alone", "conv3x3_forward", x, w, numbers(O))
    compare("alone", "conv3x3_backward", numbers(B, T, F, O), x, w)
    compare("block 1", "dropout", numbers(*BLOCKS["block 2"][:4]), 0.25, reference.dropout_key(1, 2, 3))
    logits, targets = 3 * numbers(32, 7), rng.integers(0, 7, 32)
    compare("of 7 classes", "softmax", logits)
    _, p = compare("of 7 classes", "cross_entropy_forward", logits, targets)
    compare("of 7 classes", "cross_entropy_backward", p, targets)
    compare("of 7 classes, smoothed", "cross_entropy_forward", logits, targets, smoothing=0.1)
    compare("of 7 classes, smoothed", "cross_entropy_backward", p, targets, smoothing=0.1)
    tally, true = arrays.Tally(), host.Tally()
    for loss in (0.5, 0.25):
        tally.add(arrays.asarray(np.array(loss, np.float32)), arrays.asarray(p), arrays.asarray(targets))
        true.add(loss, p, targets)
    judge("Tally", [(np.array(tally.read()), np.array(true.read()))])
    B, T, F = BLOCKS["block 1"][:3]
    x, place = numbers(B, T, F), np.arange(4 * B).reshape(B, 4) // 2
    compare("of block 1", "zeros_like", x)
    compare("of block 1", "step_before", x)
    compare("of block 1", "last_step_forward", x)
    compare("of block 1", "last_step_backward", numbers(B, F), T)
    compare("of block 1", "windows_forward", x, frames=T - 2, hop=1, count=3)
    compare("of block 1", "windows_backward", numbers(B, 3, T - 2, F), total=T, hop=1)
    compare("of block 1", "take_windows", numbers(T + B, F), np.arange(B)[::-1].copy(), length=T)
    compare("of block 1", "take_rows", numbers(2 * B, F), place)
    compare("of block 1", "add_rows", numbers(4 * B, F), place, count=2 * B)
    for longest in (0.5, 1e9):  # shorter than the gradients, and longer
        gradients = [x, x[0]]
        ours = arrays.shortened([arrays.asarray(dw) for dw in gradients], longest)
        theirs = host.shortened([wide(dw) for dw in gradients], longest)
        judge(f"shortened to {longest:g}", list(zip(map(arrays.asnumpy, ours), theirs, strict=True)))
    return results


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def check_losses(arch: str) -> Results:
    """STEPS training steps at the paper's size and batch 32: the losses on the GPU beside those on the cpu."""
    import numpy as np

    from npser.models import build_model
    from npser.optim import SGD
    from npser.recipes import RECIPES

    rng = np.random.default_rng(1)
    models = {backend: build_model(arch, backend=backend, seed=0, **NETWORK) for backend in ("cuda", "cpu")}
    bins = models["cpu"].settings["bins"]
    x = rng.standard_normal((PAPER_BATCH, models["cpu"].input_frames, bins), dtype=np.float32)
    y = rng.integers(0, 7, PAPER_BATCH)
    losses = {}
    for backend, model in models.items():
        sgd = SGD(clip_norm=RECIPES["paper"][arch].clip_norm)
        losses[backend] = [model.train_step(x, y, sgd) for _ in range(STEPS)]
    error = float(np.abs(np.subtract(losses["cuda"], losses["cpu"])).max())
    return {"losses": losses, "error": error, "agrees": error <= LOSS_TOLERANCE}


# --- the sections, and how they are run --------------------------------------------------------------------------

CHECKS: dict[str, Callable[[], Results]] = {
    "launching": check_launching,
    "parity float32": lambda: check_operations("float32"),
    "parity tf32": lambda: check_operations("tf32"),
    **{f"ten steps {arch}": partial(check_losses, arch) for arch in ARCHITECTURES},
    "small float32": lambda: check_operations("float32"),  # for the sanitizer
    "small tf32": lambda: check_operations("tf32"),
}
SANITIZED = [(tool, precision) for tool in ("memcheck", "racecheck", "synccheck") for precision in ("float32", "tf32")]
SANITIZED_LIMIT = 60.0  # seconds
WITHOUT = ["--without", "torch.compile"]
BENCHED = {
    **{
        f"bench train {arch}": ["train", *(f"--rows={arch} training step, B {B}" for B in (32, 128)), *WITHOUT]
        for arch in ARCHITECTURES
    },
    "bench infer": ["infer", "--rows", "inference, B 32", "--rows", "inference, B 128", *WITHOUT],
    "bench kernels": ["kernels", "--rows", "B 32", "--rows", "dense", *WITHOUT],
    "bench compiled": ["train", "--rows", "training step, B 32", "--without", "jax", "--without", "jax-tf32"],
}
SECTIONS = (
    *(name for name in CHECKS if not name.startswith("small")),
    *BENCHED,
    *(f"{tool} {precision}" for tool, precision in SANITIZED),
)


def disagreements(results: Any, path: str = "") -> Iterator[str]:
    """The paths of everything that did not agree, or failed."""
    if not isinstance(results, dict):
        return
    if results.get("agrees") is False or "section failed" in results:
        yield path
    for key, value in results.items():
        yield from disagreements(value, f"{path} / {key}" if path else key)


def _last_json(printed: str) -> Results:
    """The last line that is a whole JSON object: what there was when the section ended, or was ended."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found: Results = json.loads(line)
                return found
    return {}


def _finished(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """A member of an archive, unless it is a temporary file."""
    return None if Path(member.name).name.startswith(".") else member


class Check:
    """One call of the program: what it was asked, what there is so far."""

    def __init__(self, options: Any) -> None:
        self.options, self.out = options, options.out
        self.end = time.monotonic() + options.time
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = options.work or self.out.with_name(f"{self.out.name}-work")
        self.work.mkdir(parents=True, exist_ok=True)
        # Numba may lie in a folder of its own, on a machine on which nothing can be installed.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self.results: Results = {}
        if options.resume:
            self.take_over(options.resume)

    def take_over(self, earlier: Path) -> None:
        """What an earlier call left: results, and the finished folds of cross-validations."""
        found = earlier / "gpu_check.json"
        self.results = json.loads(found.read_text()) if found.exists() else {}
        for path in earlier.glob("[!.]*"):
            if path.is_file() and path.resolve().parent != self.out.resolve():
                shutil.copyfile(path, self.out / path.name)
        for path in self.out.glob("[!.]*.tar.gz"):
            try:
                with tarfile.open(path) as archive:
                    archive.extractall(self.work, filter="data")
            except (tarfile.TarError, EOFError, OSError) as error:
                print(f"{path}: cannot be read ({error}): its folds are computed again", flush=True)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def keep(self, name: str, result: Results) -> None:
        self.results[name] = result
        temporary = self.out / ".gpu_check.json"
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(temporary, self.out / "gpu_check.json")
        failed = list(disagreements({name: result}))
        print(f"{name}: {'; '.join(failed) if failed else result.get('skipped', 'done')}", flush=True)

    def wanted(self, name: str) -> bool:
        """Whether a section is asked for and was not finished by an earlier call."""
        only, before = self.options.only, self.results.get(name, {})
        # Everything else depends on the launching, and another machine may have what was missing.
        again = "section failed" in before or (name == "launching" and list(disagreements(before)))
        return (not only or any(word in name for word in only)) and bool(again or not before)

    def run(self, command: Sequence[str], limit: float) -> tuple[int | None, str]:
        """(exit status, None when it was ended for the time; standard output). The log has the rest."""
        with (self.out / "log.txt").open("a") as log:
            print("+", shlex.join(command), file=log, flush=True)
            output = self.work / "printed.txt"  # no pipe: a grandchild that outlives its parent would hold it open
            with output.open("w") as printed:
                process = subprocess.Popen(
                    command, stdout=printed, stderr=log, env=self.environment, cwd=ROOT, start_new_session=True
                )
                try:
                    status: int | None = process.wait(timeout=max(1.0, limit))
                except subprocess.TimeoutExpired:
                    self.end_all(process)
                    status = None
            text = output.read_text(errors="replace")
            log.write(text)
        return status, text

    @staticmethod
    def end_all(process: "subprocess.Popen[Any]") -> None:
        """End a process that leads its session, and whatever it has started there."""
        process.send_signal(signal.SIGINT)  # bench ends its workers, and npser.train writes its report
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def section(self, name: str) -> Results:
        """A section in a process of its own."""
        started = time.monotonic()
        limit = min(self.options.limit, self.left)
        ending = f"not finished after {limit:.0f} s"
        if name in BENCHED:
            path = self.work / "bench.json"
            path.unlink(missing_ok=True)
            command = [sys.executable, "-m", "bench", *BENCHED[name], "--device", "cuda", "--json", str(path)]
            status, _ = self.run(command, limit)
            result: Results = json.loads(path.read_text()) if path.exists() else {}
            if status != 0:
                result["section failed"] = ending if status is None else f"exit status {status}: see log.txt"
        else:
            command = [sys.executable, str(Path(__file__).resolve()), "--section", name]
            command += ["--dry"] if self.options.dry else []
            tool, _, rest = name.partition(" ")
            if (tool, rest) in SANITIZED:
                sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
                if not Path(sanitizer).exists():
                    return {"skipped": "compute-sanitizer is not installed"}
                limit = min(limit, SANITIZED_LIMIT)
                command[-1 - self.options.dry] = f"small {rest}"
                # What cuda-bindings asks of the driver when it starts is refused at times, and no fault of a kernel.
                quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []  # which is alone in looking there
                command = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", "99", *command]
            status, printed = self.run(command, limit)
            result = _last_json(printed)
            if status != 0:
                result["section failed"] = ending if status is None else f"exit status {status}: see log.txt"
            if tool in dict(SANITIZED):
                result = {key: result[key] for key in ("section failed",) if key in result}
                result["report"] = [line for line in printed.splitlines() if line.startswith("=========")][-20:]
        return {**result, "seconds": round(time.monotonic() - started, 1)}

    def cross_validate(self, arch: str) -> Results:
        """The paper's protocol, for as long as is left. The run folder is packed after every few folds."""
        started, folder = time.monotonic(), self.work / arch
        command = [sys.executable, "-m", "npser.train", "--arch", arch, "--data", str(self.options.wavs.resolve())]
        command += ["--backend", "cuda", "--precision", self.options.precision, "--no-checkpoint"]
        command += ["--out", str(folder), *shlex.split(self.options.train)]
        finished = self.folds(arch)
        with (self.out / "log.txt").open("a") as log:
            print("+", shlex.join(command), file=log, flush=True)
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=ROOT, start_new_session=True
            )
            try:
                while process.poll() is None and self.left > 0:
                    time.sleep(min(2.0, max(0.1, self.left)))
                    if self.folds(arch) > finished:
                        finished = self.folds(arch)
                        self.pack(arch)
                out_of_time = process.poll() is None
            finally:
                self.end_all(process)
            status = process.wait()
        self.pack(arch)
        before = self.results.get(f"cross-validation {arch}", {}).get("seconds", 0)
        result: Results = {"out_of_time": out_of_time, "finished_folds": self.folds(arch)}
        result["seconds"] = round(before + time.monotonic() - started, 1)
        if status != 0:
            result["section failed"] = "out of time: go on with --resume" if out_of_time else f"exit status {status}"
        return result

    def folds(self, arch: str) -> int:
        return len(list((self.work / arch / "folds").glob("*.json")))

    def pack(self, arch: str) -> None:
        """Keep the run folder as it is; of one that is being written to at this moment, the next fold will do."""
        temporary = self.out / f".{arch}.tar.gz"
        with contextlib.suppress(FileNotFoundError, tarfile.TarError, OSError):
            with tarfile.open(temporary, "w:gz") as archive:
                archive.add(self.work / arch, arcname=arch, filter=_finished)
            os.replace(temporary, self.out / f"{arch}.tar.gz")

    def everything(self) -> None:
        for name in SECTIONS:
            if self.wanted(name) and self.left > 5:
                self.keep(name, self.tried(self.section, name))
                if name == "launching":
                    print(json.dumps(self.results[name]), flush=True)
            if name == "launching" and list(disagreements(self.results.get(name, {}), name)):
                self.environment["KERNELS_CUDA_LAUNCHER"] = "numba"
                self.keep("launching through Numba", self.tried(self.section, name))
        for arch in ARCHITECTURES if self.options.wavs else ():
            name = f"cross-validation {arch}"
            if self.wanted(name) and self.left > 5:
                self.keep(name, self.tried(self.cross_validate, arch))

    @staticmethod
    def tried(section: Callable[[str], Results], name: str) -> Results:
        """What the section gives; whatever it raises spoils nothing but itself."""
        try:
            return section(name)
        except Exception as error:
            return {"section failed": f"{type(error).__name__}: {error}"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bench/gpu_check.py", description=(__doc__ or "").split("\n\n")[1])
    p.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for results (default: gpu_check)")
    p.add_argument("--work", type=Path, help="folder for the run folders (default: OUT-work)")
    p.add_argument("--resume", type=Path, metavar="FOLDER", help="OUT of an earlier call, to go on from")
    p.add_argument("--wavs", type=Path, help="folder of EMO-DB's recordings, for the cross-validations")
    p.add_argument("--time", type=float, default=570.0, help="seconds for everything (default: 570)")
    p.add_argument("--limit", type=float, default=180.0, help="seconds that a section may take (default: 180)")
    p.add_argument("--precision", default="float32", choices=("float32", "tf32"), help="of the cross-validations")
    p.add_argument("--train", default="", metavar="OPTIONS", help="more options of npser.train, such as '--epochs 5'")
    p.add_argument("--only", action="append", default=[], metavar="WORD", help="sections with this word in their name")
    p.add_argument("--dry", action="store_true", help="try the program in Numba's simulator, with tiny sizes")
    p.add_argument("--section", choices=CHECKS, help=argparse.SUPPRESS)  # what a process of its own is asked for
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    import kernels

    try:
        if options.dry:
            from kernels.cuda import allow_simulator

            allow_simulator()
            sys.setswitchinterval(1e-4)  # the simulator polls its threads
            shrink(TINY_DENSE, TINY_LSTMS, TINY_BLOCKS, {"filters": 2, "hidden": 3, "bins": 4, "classes": 7})
        kernels.rung("cuda")
    except kernels.Unavailable as error:
        print(f"bench/gpu_check.py: {error}", file=sys.stderr)
        return 2
    if options.section:
        if options.section.startswith("small") and not options.dry:
            shrink(SMALL_DENSE, SMALL_LSTMS, SMALL_BLOCKS, {})
        print(json.dumps(CHECKS[options.section]()), flush=True)
        return 0
    from npser.cli import machine, versions

    if options.wavs and not any(options.wavs.rglob("*.wav")):
        print(f"bench/gpu_check.py: --wavs {options.wavs}: holds no recording: did they travel?", file=sys.stderr)
        return 2
    if options.resume and not (options.resume / "gpu_check.json").exists():
        print(f"bench/gpu_check.py: --resume {options.resume}: holds no gpu_check.json", file=sys.stderr)
        return 2
    check = Check(options)
    check.keep("machine", {"machine": machine(), "versions": versions(), "arguments": sys.argv[1:]})
    check.everything()
    return 1 if list(disagreements(check.results)) else 0


if __name__ == "__main__":
    sys.exit(main())
