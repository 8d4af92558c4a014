"""Compiled kernels without a GPU: their PTX, translated to C, in the place of a device.

The simulator runs a kernel's Python, with tiny tiles. What a GPU gets is PTX, with the tiles that it computes with,
vector loads, tensor cores and dynamic shared memory. Here that text is executed, instruction by instruction, by the
threads of `ptx_machine.h`, which look for what only a GPU would show: accesses that are out of bounds or not aligned,
races, threads that wait for each other for ever. `install` puts this machine where `kernels.cuda.device` looks for a
GPU, so that arguments are packed, shared memory is granted and memory is pooled as on a real one.

It knows the instructions that the kernels use, and says so when one comes that it does not know.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import types
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
OPTIONS = ["-O1", "-march=native", "-ffp-contract=off", "-frounding-math", "-fwrapv", "-fno-strict-aliasing", "-w"]

# --- PTX -> C ----------------------------------------------------------------------------------------------------

C_TYPES = {f"{kind}{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64) for kind in "bu"}
C_TYPES |= {f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)}
C_TYPES |= {"f32": "float", "f64": "double", "pred": "int"}
REGISTERS = {"p": "pred", "f": "f32", "r": "u32", "rd": "u64", "fd": "f64", "rs": "u16"}  # %rd1 is a u64
REGISTER = re.compile(r"%(p|f|r|rd|fd|rs)(\d+)")
SPECIAL = {"%tid.x": "current", "%ntid.x": "threads", "%dynamic_smem_size": "dynamic_shared"}
SPECIAL |= {f"%{ptx}.{axis}": f"{c}.{axis}" for ptx, c in (("ctaid", "block"), ("nctaid", "blocks")) for axis in "xyz"}

# What an instruction computes of its operands a, b, c, all of the type that ends its name, into one of that type.
EXPRESSIONS = {
    **dict.fromkeys(("mov", "cvta.to.global"), "a"),
    "add": "a + b", "sub": "a - b", "mul": "a * b", "mul.lo": "a * b", "mul.hi": "((__int128)a * b) >> 64",
    "div": "a / b", "div.rn": "a / b", "rem": "a % b", "fma.rm": "fma_down(a, b, c)", "neg": "-a", "abs": "fabs(a)",
    "and": "a & b", "or": "a | b", "xor": "a ^ b", "not": "~a", "copysign": "copysign(b, a)",
    "ex2.approx.ftz": "exp2f(a)", "rcp.approx.ftz": "1.0f / a", "sqrt.rn": "sqrt(a)",
}  # fmt: skip
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def bytes_of(kind):
    return int(kind[1:]) // 8


class Translation:
    """One kernel: `c` is the text; `static` its bytes of shared memory without the dynamic ones; `most` its threads."""

    def __init__(self, ptx):
        self.shared, self.static = {}, 0
        for declared, align, name, size in re.findall(r"\.(\w+) \.shared \.align (\d+) \.b8 (\w+)\[(\d*)\];", ptx):
            self.static += -self.static % int(align)
            self.shared[name] = self.static
            self.static += int(size) if declared == "visible" else 0
        self.static += -self.static % 16
        for name in re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", ptx):
            self.shared[name] = self.static  # the dynamic ones lie behind the others
        self.most = int(re.search(r"\.maxntid (\d+)", ptx)[1])
        body = ptx[ptx.index("\n{", ptx.index(".entry")) :]
        lines = [self._line(line.split("//")[0].strip()) for line in body.splitlines()]
        named = sorted(set(REGISTER.findall(ptx)))
        declared = [f"{C_TYPES[REGISTERS[kind]]} {kind}_{number} = 0;" for kind, number in named]
        self.c = "\n".join([
            f"#define STATIC_SHARED {self.static}",
            (HERE / "ptx_machine.h").read_text(),
            "static void kernel(void) {", *declared, *lines, "return;", "}", "",
        ])  # fmt: skip

    def _line(self, line):
        if not line or line.startswith((".", "{", "}")):
            return ""
        if label := re.fullmatch(r"\$(\w+):", line):
            return f"{label[1]}:;"
        unless, predicate, name, operands = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.]+)\s*(.*);", line).groups()
        done = self._instruction(name, [x.strip() for x in re.sub("[{}]", "", operands).split(",") if x.strip()])
        if predicate:
            return f"if ({'!' if unless else ''}{self._read(predicate, 'pred')}) {{ {done} }}"
        return f"{{ {done} }}"

    def _read(self, operand, kind):
        """An operand as a C expression of this type."""
        if operand in SPECIAL:
            return f"(({C_TYPES[kind]}){SPECIAL[operand]})"
        if operand in self.shared:
            return f"({self.shared[operand]}ull)"
        if operand.startswith(("0f", "0d")):
            value = f"f{4 * len(operand[2:])}_of_bits(0x{operand[2:]}ull)"
            return value if kind[0] == "f" else f"0x{operand[2:]}ull"
        if register := REGISTER.fullmatch(operand):
            return self._as(kind, REGISTERS[register[1]], "_".join(register.groups()))
        return f"(({C_TYPES[kind]}){int(operand) % 2**64}ull)"

    @staticmethod
    def _as(to, kind, value):
        """A value of one type as another one: the same bits where one of them is a real, else a conversion."""
        if "pred" in (to, kind) or (to[0] == "f") == (kind[0] == "f"):
            return f"(({C_TYPES[to]})({value}))"
        if to[0] == "f":
            return f"{to}_of_bits({value})"
        return f"bits_of_{kind}({value})"

    def _write(self, register, kind, value):
        name, number = REGISTER.fullmatch(register).groups()
        if kind[0] != "f" and REGISTERS[name] != "pred":  # bits beyond the type's own are those of the number
            value = f"({C_TYPES[kind]})({value})"
        return f"{name}_{number} = {self._as(REGISTERS[name], kind, value)};"

    def _instruction(self, name, operands):
        words, kind = name.split("."), name.rsplit(".", 1)[-1]
        first = words[0]
        if first == "bra":
            return f"goto {operands[0][1:]};"
        if name in ("ret", "bar.sync"):
            return "return;" if name == "ret" else "barrier();"
        if first in ("ld", "st"):
            return self._memory(first, words, kind, operands)
        if first == "mma":
            numbers = [self._read(x, "f32") for x in operands[4:]]
            a, b, c = (", ".join(numbers[slice(*ends)]) for ends in ((0, 4), (4, 6), (6, 10)))
            results = " ".join(self._write(x, "f32", f"c[{i}]") for i, x in enumerate(operands[:4]))
            return f"float a[] = {{{a}}}, b[] = {{{b}}}, c[] = {{{c}}}; mma(a, b, c); {results}"
        target, *sources = operands
        if first == "cvt":
            value = self._read(sources[0], kind)
            if name == "cvt.rna.tf32.f32":
                return self._write(target, "u32", f"tf32({value})")
            return self._write(target, words[-2], f"saturated({value})" if "sat" in words else value)
        if first == "mul" and words[1] == "wide":
            a, b = (self._read(x, kind) for x in sources)
            return self._write(target, f"{kind[0]}64", f"({C_TYPES[kind[0] + '64']}){a} * {b}")
        if first == "selp":
            yes, no = (self._read(x, kind) for x in sources[:2])
            return self._write(target, kind, f"{self._read(sources[2], 'pred')} ? {yes} : {no}")
        if first == "bfi":
            values = [self._read(x, "u64") for x in sources]
            return self._write(target, kind, f"insert_bits({', '.join(values)})")
        if first in ("shl", "shr"):
            a, by, bits = self._read(sources[0], kind), self._read(sources[1], "u32"), 8 * bytes_of(kind)
            beyond = f"{a} < 0 ? -1 : 0" if kind[0] == "s" and first == "shr" else "0"
            sign = "<<" if first == "shl" else ">>"
            return self._write(target, kind, f"{by} < {bits} ? {a} {sign} {by} : ({beyond})")
        values = dict(zip("abc", (self._read(x, kind) for x in sources), strict=False))
        if first == "setp":
            return self._write(target, "pred", self._comparison(words[1], **values))
        key = ".".join(words[:-1])
        if first in ("min", "max"):
            sign = "<" if first == "min" else ">"
            template = f"f{first}f(a, b)" if kind == "f32" else f"a {sign} b ? a : b"
        elif key == "fma.rn":
            template = "__builtin_fmaf(a, b, c)" if kind == "f32" else "__builtin_fma(a, b, c)"
        elif key == "not" and kind == "pred":
            template = "!a"
        elif key in EXPRESSIONS:
            template = EXPRESSIONS[key]
        else:
            raise NotImplementedError(f"ptx_machine.py does not know the instruction {name}")
        return self._write(target, kind, re.sub(r"\b[abc]\b", lambda letter: values[letter[0]], template))

    @staticmethod
    def _comparison(word, a, b):
        """Of reals, "ltu" also holds where one is not a number, "ne" (C's would) does not."""
        numbers = f"({a} == {a} && {b} == {b})"
        if word in ("num", "nan"):
            return numbers if word == "num" else f"!{numbers}"
        if word in COMPARISONS:
            return f"{a} {COMPARISONS[word]} {b}" + (f" && {numbers}" if word == "ne" else "")
        return f"!{numbers} || {a} {COMPARISONS[word[:-1]]} {b}"

    def _memory(self, first, words, kind, operands):
        where, registers = (operands[-1], operands[:-1]) if first == "ld" else (operands[0], operands[1:])
        base, offset = re.fullmatch(r"\[(.+?)(?:\+(-?\d+))?\]", where).groups()
        if words[1] == "param":
            place = f"parameters[{base.rsplit('_', 1)[1]}]"
        else:
            size, store = bytes_of(kind) * len(registers), int(first == "st")
            place = f"{words[1]}_at({self._read(base, 'u64')} + {int(offset or 0)}ll, {size}, {store})"
        moves = [
            self._write(x, kind, f"at[{i}]") if first == "ld" else f"at[{i}] = {self._read(x, kind)};"
            for i, x in enumerate(registers)
        ]
        return " ".join([f"{C_TYPES[kind]} *at = (void *){place};", *moves])


@cache
def ptx_of(kernel, capability):
    """A kernel's PTX, compiled once in a process."""
    return kernel.ptx(capability)


# --- a device ----------------------------------------------------------------------------------------------------


class Numbers:
    """Memory of the machine, in the place of Numba's device array: not-a-number until something is copied there."""

    def __init__(self, values):
        self.values, self.size = values, values.size
        self.device_ctypes_pointer = types.SimpleNamespace(value=values.ctypes.data)

    def __getitem__(self, part):
        return Numbers(self.values[part])

    def copy_to_device(self, other, stream):
        assert other.dtype == self.values.dtype
        self.values[:] = other

    def copy_to_host(self, host, stream):
        assert host.dtype == self.values.dtype
        host[:] = self.values


class Poisoned(list):
    """Memories that wait for their next use: nothing of the last one is left then."""

    def pop(self):
        memory = super().pop()
        memory.numbers.values.view(np.uint8)[:] = 0xFF
        return memory


class Pool(dict):
    def setdefault(self, key, nothing):
        return super().setdefault(key, Poisoned(nothing))


class Machine:
    """What `kernels.cuda.device` asks of `numba.cuda`, and of the driver at a launch."""

    MULTIPROCESSOR_COUNT, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, compute_capability = 4, 232448, (9, 0)
    STREAM = 7

    def __init__(self, folder, cuda):
        self.folder, self.compile_ptx = folder, cuda.compile_ptx
        self.arrays = []  # for as long as the machine is there
        self.launched = {}  # kernel -> times

    def is_available(self):
        return True

    def get_current_device(self):
        return self

    def stream(self):
        return types.SimpleNamespace(synchronize=lambda: None)

    def device_array(self, size, dtype, stream):
        room = np.full(size * np.dtype(dtype).itemsize + 256, 0xFF, np.uint8)
        first = -room.ctypes.data % 256
        values = room[first : first + size * np.dtype(dtype).itemsize].view(dtype)
        self.arrays.append(values)
        return Numbers(values)

    def loaded(self, kernel):
        """In the place of `launching.Loaded`."""
        from kernels.cuda import launching

        translation = Translation(ptx_of(kernel, self.compute_capability))
        path = self.folder / f"{kernel.name}-{hashlib.sha256(translation.c.encode()).hexdigest()[:16]}"
        path.with_suffix(".c").write_text(translation.c)
        command = [COMPILER, *OPTIONS, "-shared", "-fPIC", "-o", path.with_suffix(".so"), path.with_suffix(".c"), "-lm"]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(path.with_suffix(".so")))
        library.reported.restype = ctypes.c_char_p
        arguments, granted = launching.Arguments(kernel.kinds), [48 * 1024]

        def launch(blocks, threads, shared, stream, values):
            x, y, z = blocks
            assert stream == self.STREAM
            assert 0 < threads <= translation.most
            assert min(blocks) > 0
            assert max(y, z) < 2**16
            assert shared <= granted[0]
            arguments.pack(arguments.memory, 0, *values)
            ends = [end for a in self.arrays for end in (a.ctypes.data, a.ctypes.data + a.nbytes)]
            places = (ctypes.c_uint64 * len(ends))(*ends)
            known = len(self.arrays)
            if library.launch(ctypes.c_void_p(arguments.address), x, y, z, threads, shared, known, places):
                raise AssertionError(f"{kernel.name}: {library.reported().decode()}")
            self.launched[kernel.name] = self.launched.get(kernel.name, 0) + 1

        def allow_shared(size):
            granted[0] = size
            return True

        return types.SimpleNamespace(launch=launch, allow_shared=allow_shared)


def install(patch, folder):
    """Put the machine where `kernels.cuda.device` looks for a GPU, for as long as pytest's `patch` lasts."""
    from kernels.cuda import device

    machine = Machine(folder, device.cuda)
    loaded = {}

    def load(kernel):
        if kernel.name not in loaded:
            loaded[kernel.name] = machine.loaded(kernel)
        return loaded[kernel.name]

    patch.setattr(device, "cuda", machine)
    patch.setattr(device, "DIRECT", True)
    patch.setattr(device, "_pool", Pool())
    patch.setattr(device, "_stream", None)
    patch.setattr(device, "_stream_handle", lambda: machine.STREAM)
    patch.setattr(device.Kernel, "loaded", property(load))
    forget()
    return machine


def forget():
    """What was found out about the GPU that is, or is not, there."""
    from kernels.cuda import device

    for cached in (device._capability, device._most_shared, device.multiprocessors):
        cached.cache_clear()
