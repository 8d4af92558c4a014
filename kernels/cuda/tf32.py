"""The tensor cores, in TF32: two instructions that Numba does not know, as inline PTX.

TF32 is float32 with 10 bits of mantissa instead of 23; products of two such numbers are exact in float32, and sums are
float32. `mma` multiplies 16x8 by 8x8 numbers that a warp of 32 threads holds together. With g = lane // 4 and
q = lane % 4, a thread's share is

    a: (g, q), (g+8, q), (g, q+4), (g+8, q+4)     b: (q, g), (q+4, g)     c: (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1)

(PTX ISA, "Matrix fragments for mma.m16n8k8 with .tf32"). The simulator cannot express these.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils as numba_cgutils

from kernels.cuda.device import SIMULATED, extension, float32, types

_FLOAT = ir.FloatType()
cgutils: Any = numba_cgutils

if SIMULATED:

    def rounded(x: Any) -> Any:
        raise NotImplementedError("the simulator has no tensor cores")

    def mma(a: Any, b: Any, c: Any) -> Any:
        raise NotImplementedError("the simulator has no tensor cores")

else:

    @extension("intrinsic")
    def rounded(typing_context: Any, x: Any) -> Any:
        """float32 -> the nearest TF32 number, as a float32."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            # The result is declared as 32 bits without a type, so it passes through an integer register.
            function = ir.FunctionType(ir.IntType(32), [_FLOAT])
            bits = builder.call(ir.InlineAsm(function, "cvt.rna.tf32.f32 $0, $1;", "=r,f", False), arguments)
            return builder.bitcast(bits, _FLOAT)

        return float32(x), generate

    @extension("intrinsic")
    def mma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
        """a (16, 8) times b (8, 8) plus c (16, 8), by a warp: tuples of 4, 2 and 4 float32 in, of 4 out."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            factors = [*cgutils.unpack_tuple(builder, arguments[0], 4), *cgutils.unpack_tuple(builder, arguments[1], 2)]
            bits = [builder.bitcast(value, ir.IntType(32)) for value in factors]
            sums = cgutils.unpack_tuple(builder, arguments[2], 4)
            function = ir.FunctionType(ir.LiteralStructType([_FLOAT] * 4), [ir.IntType(32)] * 6 + [_FLOAT] * 4)
            text = (
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
            )
            assembly = ir.InlineAsm(function, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", False)
            # Convergent: the compiler must not move it to where only some threads of the warp come by.
            result = builder.call(assembly, bits + list(sums), attrs=("convergent",))
            parts = [builder.extract_value(result, n) for n in range(4)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(types.float32, 4)(a, b, c), generate
