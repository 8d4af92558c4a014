"""A staged SIMD language for Numba: vector kernels that read like their mathematics.

Numba compiles loops, and LLVM vectorises the easy ones; it will not keep a tile of accumulators in registers across a
reduction, which is what a convolution or a matrix product lives on. So the hot loops here are written in vectors. A
function decorated with `@kernel` runs once, in Python, when Numba compiles its caller, on symbolic values whose
operators emit LLVM instructions:

    @kernel
    def dot_rows(k, x: Ptr, w: Ptr, n: Int, y: Ptr):
        acc = [k.var(0.0) for _ in range(4)]         # four vector registers, LANES floats each
        for i in k.range(n):                         # a loop of the machine: n is known when it runs
            for r in range(4):                       # a loop of Python: unrolled while compiling
                acc[r] += k.splat(x + 4 * i + r) * k.load(w + LANES * i)     # one fused multiply-add each
        for r in range(4):
            k.store(y + LANES * r, acc[r])

`dot_rows(x.ctypes.data, w.ctypes.data, n, y.ctypes.data)` is then called from @njit code with addresses and integers.

Three rules:
- Which loop unrolls is said by its kind: `range` in Python, `k.range` in the machine. What Python computes (list
  indices, constants) is gone at run time.
- Pointers are addresses of float32; `p + i` moves by i elements. `Bytes` pointers move by bytes. Nothing checks bounds.
- Memory that a kernel writes must be kept alive by the Python caller: Numba may free an array created inside @njit code
  after its last visible use, and an address is no use that it can see.

The vector width is the machine's: 16 floats with AVX-512, 8 with AVX, 4 with SSE or NEON (`LANES`), and tiles are cut
to the number of vector registers (`REGISTERS`).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, Union

from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_alloca: Any = cgutils.alloca_once  # at the head of the function, where LLVM turns it into a register
_function: Any = cgutils.get_or_insert_function

F32, I8, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _machine() -> tuple[int, int]:
    """(floats in a vector register, vector registers) of the machine that Numba compiles for.

    The compiler is asked, not the CPU's name: it translates one addition of 16 floats, and the registers that it
    chooses tell. So NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are respected.
    """
    codegen = cpu_target.target_context.codegen()
    _, cpu, features = codegen.magic_tuple()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(cpu=cpu, features=features, opt=2)
    module = llvm.parse_assembly(
        "define void @add(ptr %p) {\n %x = load <16 x float>, ptr %p\n %y = fadd <16 x float> %x, %x\n"
        " store <16 x float> %y, ptr %p\n ret void\n}"
    )
    assembly = machine.emit_assembly(module)
    if "zmm" in assembly:
        return 16, 32
    if "ymm" in assembly:
        return 8, 16
    return 4, (16 if "xmm" in assembly else 32)


LANES, REGISTERS = _machine()
VEC = ir.VectorType(F32, LANES)
IVEC = ir.VectorType(I32, LANES)


class Value:
    """A symbolic value and the emitter that records what is done with it."""

    def __init__(self, k: "Emitter", value: ir.Value) -> None:
        self.k, self.ir = k, value


class Int(Value):
    """A 64-bit integer known at run time."""

    def _operand(self, other: Union["Int", int]) -> ir.Value:
        return other.ir if isinstance(other, Int) else ir.Constant(I64, other)

    def __add__(self, other: Union["Int", int]) -> "Int":
        return Int(self.k, self.k.b.add(self.ir, self._operand(other)))

    def __sub__(self, other: Union["Int", int]) -> "Int":
        return Int(self.k, self.k.b.sub(self.ir, self._operand(other)))

    def __mul__(self, other: Union["Int", int]) -> "Int":
        return Int(self.k, self.k.b.mul(self.ir, self._operand(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other: Union["Int", int]) -> "Condition":
        return Condition(self.k, self.k.b.icmp_signed("<", self.ir, self._operand(other)))

    def __and__(self, other: int) -> "Int":
        return Int(self.k, self.k.b.and_(self.ir, self._operand(other)))

    def __rshift__(self, other: int) -> "Int":
        return Int(self.k, self.k.b.lshr(self.ir, self._operand(other)))

    def __floordiv__(self, other: int) -> "Int":
        """For numbers that are not negative."""
        return Int(self.k, self.k.b.udiv(self.ir, self._operand(other)))


P = TypeVar("P", bound="Ptr")


class Ptr(Int):
    """The address of a float32; sums count in elements."""

    size = 4

    def __add__(self: P, other: Int | int) -> P:
        return type(self)(self.k, self.k.b.add(self.ir, self._operand(other * self.size)))

    __radd__ = __add__

    def at(self, kind: ir.Type) -> ir.Value:
        return self.k.b.inttoptr(self.ir, kind.as_pointer())


class Bytes(Ptr):
    """The address of a byte."""

    size = 1


class Mask(Value):
    """One truth value per lane."""

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(self.k, self.k.b.or_(self.ir, other.ir))


class Condition(Value):
    """One truth value, for `k.when`."""

    def __and__(self, other: "Condition") -> "Condition":
        return Condition(self.k, self.k.b.and_(self.ir, other.ir))


class IVec(Value):
    """LANES 32-bit integers."""

    def equals(self, number: int) -> Mask:
        return Mask(self.k, self.k.b.icmp_signed("==", self.ir, ir.Constant(IVEC, [number] * LANES)))


Number = Union["Vec", float, int]
CONTRACT = ("contract",)  # lets LLVM fuse a product and a sum into one fused multiply-add


class Vec(Value):
    """LANES float32 numbers. A Python number beside a vector stands for that number in every lane."""

    def _operand(self, other: Number) -> ir.Value:
        return other.ir if isinstance(other, Vec) else ir.Constant(VEC, [float(other)] * LANES)

    def __add__(self, other: Number) -> "Vec":
        return Vec(self.k, self.k.b.fadd(self.ir, self._operand(other), flags=CONTRACT))

    def __sub__(self, other: Number) -> "Vec":
        return Vec(self.k, self.k.b.fsub(self.ir, self._operand(other), flags=CONTRACT))

    def __rsub__(self, other: Number) -> "Vec":
        return Vec(self.k, self.k.b.fsub(self._operand(other), self.ir, flags=CONTRACT))

    def __mul__(self, other: Number) -> "Vec":
        return Vec(self.k, self.k.b.fmul(self.ir, self._operand(other), flags=CONTRACT))

    def __truediv__(self, other: Number) -> "Vec":
        return Vec(self.k, self.k.b.fdiv(self.ir, self._operand(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> "Vec":
        function = _function(self.k.b.module, ir.FunctionType(VEC, [VEC]), f"llvm.fabs.v{LANES}f32")
        return Vec(self.k, self.k.b.call(function, [self.ir]))

    def _compare(self, how: str, other: Number) -> Mask:
        return Mask(self.k, self.k.b.fcmp_ordered(how, self.ir, self._operand(other)))

    def __gt__(self, other: Number) -> Mask:
        return self._compare(">", other)

    def __lt__(self, other: Number) -> Mask:
        return self._compare("<", other)

    def __le__(self, other: Number) -> Mask:
        return self._compare("<=", other)

    def unordered(self, other: "Vec") -> Mask:
        """True in the lanes where self or other is not a number."""
        return Mask(self.k, self.k.b.fcmp_unordered("uno", self.ir, other.ir))


class Var:
    """A mutable vector, which LLVM keeps in a register: `v += x * w` is one fused multiply-add."""

    def __init__(self, k: "Emitter", init: Number) -> None:
        self.k, self.slot = k, _alloca(k.b, VEC)
        self.set(init)

    def set(self, value: Number) -> None:
        self.k.b.store(self.k.vector(value).ir, self.slot)

    def get(self) -> Vec:
        return Vec(self.k, self.k.b.load(self.slot))

    def __iadd__(self, value: Vec) -> "Var":
        self.set(self.get() + value)
        return self


class Emitter:
    """What a kernel calls `k`: loads, stores, loops and selections."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def vector(self, value: Number) -> Vec:
        return value if isinstance(value, Vec) else Vec(self, ir.Constant(VEC, [float(value)] * LANES))

    def ints(self, value: int) -> IVec:
        """The integer `value` in every lane."""
        return IVec(self, ir.Constant(IVEC, [value] * LANES))

    def var(self, init: Number) -> Var:
        return Var(self, init)

    def load(self, p: Ptr) -> Vec:
        return Vec(self, self.b.load(p.at(VEC), align=4))

    def store(self, p: Ptr, value: Vec | Var) -> None:
        vector = value.get() if isinstance(value, Var) else value
        self.b.store(vector.ir, p.at(VEC), align=4)

    def prefetch(self, p: Ptr, level: int = 1) -> None:
        """Ask for the cache line at p ahead of its use, as near as the cache of this level; any address is allowed."""
        kinds = [ir.PointerType(I8), I32, I32, I32]
        fetch = _function(self.b.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(I32, n) for n in (0, 4 - level, 1))
        self.b.call(fetch, [p.at(I8), read, keep, data])

    def store_float(self, p: Ptr, value: Vec) -> None:
        """Store the first lane alone."""
        self.b.store(self.b.extract_element(value.ir, ir.Constant(I32, 0)), p.at(F32), align=4)

    def store_bytes(self, p: Bytes, value: IVec) -> None:
        """Store the lowest byte of every lane: LANES bytes."""
        small = ir.VectorType(I8, LANES)
        self.b.store(self.b.trunc(value.ir, small), p.at(small), align=1)

    def load_bytes(self, p: Bytes) -> IVec:
        """LANES bytes, widened to 32-bit integers."""
        return IVec(self, self.b.zext(self.b.load(p.at(ir.VectorType(I8, LANES)), align=1), IVEC))

    def load_int(self, p: Bytes) -> Int:
        """The 32-bit integer at p."""
        return Int(self, self.b.sext(self.b.load(p.at(I32), align=4), I64))

    def load_byte(self, p: Bytes) -> Int:
        return Int(self, self.b.zext(self.b.load(p.at(I8), align=1), I64))

    def splat(self, p: Ptr) -> Vec:
        """The float at p in every lane."""
        undefined = ir.Constant(VEC, ir.Undefined)
        one = self.b.insert_element(undefined, self.b.load(p.at(F32), align=4), ir.Constant(I32, 0))
        return Vec(self, self.b.shuffle_vector(one, undefined, ir.Constant(IVEC, [0] * LANES)))

    def add_sum(self, p: Ptr, value: Vec) -> None:
        """Add the sum of all lanes to the float at p."""
        reduce = _function(self.b.module, ir.FunctionType(F32, [F32, VEC]), f"llvm.vector.reduce.fadd.v{LANES}f32")
        before = self.b.load(p.at(F32), align=4)
        total = self.b.call(reduce, [before, value.ir], fastmath=("reassoc",))
        self.b.store(total, p.at(F32), align=4)

    def where(self, mask: Mask, yes: Any, no: Any) -> Any:
        """Lane by lane `yes` or `no` (both Vec, numbers beside a Vec, or both IVec)."""
        if isinstance(yes, IVec):
            return IVec(self, self.b.select(mask.ir, yes.ir, no.ir))
        return Vec(self, self.b.select(mask.ir, self.vector(yes).ir, self.vector(no).ir))

    def clamp(self, value: Vec, low: float, high: float) -> Vec:
        """value cut to [low, high]; not-a-number stays what it is."""
        value = self.where(value < low, low, value)
        return self.where(value > high, high, value)

    def range(self, n: Int) -> Iterator[Int]:
        """A loop of the machine: its body is whatever the caller's `for` emits."""
        with cgutils.for_range(self.b, n.ir) as loop:
            yield Int(self, loop.index)

    @contextmanager
    def when(self, condition: Condition) -> Iterator[None]:
        """Run the body of the `with` only where the condition holds."""
        with self.b.if_then(condition.ir):
            yield

    def nonzero(self, p: Ptr) -> Condition:
        """Is the float at p not 0? Not-a-number is not 0."""
        return Condition(self, self.b.fcmp_unordered("!=", self.b.load(p.at(F32), align=4), ir.Constant(F32, 0.0)))


def kernel(trace: Callable[..., None]) -> Any:
    """Make `trace(k, name: Ptr | Bytes | Int, ...)` callable from @njit code with integer arguments."""
    kinds = [p.annotation for p in list(inspect.signature(trace).parameters.values())[1:]]
    names = ", ".join(f"a{i}" for i in range(len(kinds)))

    def typing(typing_context: Any, *args: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            k = Emitter(builder)
            trace(k, *(kind(k, value) for kind, value in zip(kinds, values, strict=True)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * len(kinds)), codegen

    # Numba reads the number of arguments from the signature, so a function with exactly that many is made here.
    scope: dict[str, Any] = {"typing": typing}
    exec(f"def {trace.__name__}(typing_context, {names}): return typing(typing_context, {names})", scope)
    return intrinsic(scope[trace.__name__])


# --- functions of vectors -------------------------------------------------------------------------------------------


def _polynomial(x: Vec, coefficients: tuple[float, ...]) -> Vec:
    """Horner's rule, highest power first."""
    value = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        value = value * x + c
    return value


def tanh(k: Emitter, x: Vec) -> Vec:
    """tanh as a quotient of polynomials in x^2, within 4e-7 of the truth everywhere; constant beyond |x| = 7.9.

    The coefficients are the minimax fit (degree 13 over 6) that is in common use since Eigen.
    """
    x = k.clamp(x, -7.90531110763549805, 7.90531110763549805)
    x2 = x * x
    numerator = (
        -2.76076847742355e-16,
        2.00018790482477e-13,
        -8.60467152213735e-11,
        5.12229709037114e-08,
        1.48572235717979e-05,
        6.37261928875436e-04,
        4.89352455891786e-03,
    )
    denominator = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
    return x * _polynomial(x2, numerator) / _polynomial(x2, denominator)


def sigmoid(k: Emitter, x: Vec) -> Vec:
    """1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2."""
    return tanh(k, x * 0.5) * 0.5 + 0.5
