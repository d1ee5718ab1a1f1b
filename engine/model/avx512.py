"""The inner loop of a matrix product in AVX-512 assembly: a few rows times one panel of packed columns.

The sums of a tile fill the vector registers to the last one, and each row's numbers come as a broadcast operand of the
multiplication itself. A compiler's scheduler loads them ahead instead, which spills the sums: a third of the speed.

See `tailserve.engine.model.microkernel` for what is computed, and for CPUs that lack these instructions.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

llvmlite.binding.initialize_native_asmparser()

_FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_AVX512 = bool(_FEATURES.get("avx512f"))
HAS_INT8_DOT = HAS_AVX512 and bool(_FEATURES.get("avx512vnni"))
HAS_BF16_DOT = HAS_AVX512 and bool(_FEATURES.get("avx512bf16"))

TALLEST = 12
"""Rows of a tile: with two vectors of columns, 24 sums and two of the panel leave registers to spare."""

MULTIPLY = {"float32": "vfmadd231ps", "bfloat16": "vdpbf16ps"}
"""sums += two vectors, the first a broadcast of 4 bytes: one float32, or two bfloat16 each with its own partner.

vpdpbusd is of the same form: four signed bytes, broadcast, with four unsigned ones; the sums are integers of 32 bits.
"""

_I64 = ir.IntType(64)
_OPERANDS = 10
_X, _ROW, _STRIDE, _PANEL, _OUT, _OUT_STRIDE, _STRIPS, _ADD, _AHEAD, _LINES = (f"${n}" for n in range(_OPERANDS))
_SCRATCH = "%r15"


def _operand(row: int, step: int) -> str:
    """Address of a row's 4 bytes. Three rows share a base register: a register of its own for each there are not."""
    base = (_X, "%r12", "%r13", "%r14")[row // 3]
    index = ("", f",{_ROW}", f",{_ROW},2")[row % 3]
    return f"{4 * step}({base}{index})"


def _tile(height: int, vectors: int, steps: int, multiply: str) -> str:
    """The assembly of one tile; `steps` steps of 4 bytes of each row are a strip."""
    first = 32 - height * vectors
    sums = [[f"%zmm{first + row * vectors + column}" for column in range(vectors)] for row in range(height)]
    flat = [name for row in sums for name in row]
    bases = [base for base in ("%r12", "%r13", "%r14") if base in "".join(_operand(row, 0) for row in range(height))]
    lines: list[str] = []

    def out(code: str) -> None:
        lines.append(code)

    def each_place(code: str) -> None:
        out(f"movq {_OUT}, {_SCRATCH}")
        for row in range(height):
            for column in range(vectors):
                out(code.format(place=f"{64 * column}({_SCRATCH})", sum=sums[row][column]))
            out(f"addq {_OUT_STRIDE}, {_SCRATCH}")

    before = _X
    for base in bases:
        out(f"leaq ({before},{_ROW},2), {base}")
        out(f"addq {_ROW}, {base}")
        before = base
    lines += [f"vpxord {name}, {name}, {name}" for name in flat]
    out(f"testq {_ADD}, {_ADD}")
    out("jz 1f")
    each_place("vmovups {place}, {sum}")
    out("1:")
    # The next strip's part of what is asked for ahead.
    out(f"movq {_LINES}, {_SCRATCH}")
    out(f"testq {_SCRATCH}, {_SCRATCH}")
    out("jz 3f")
    out("2:")
    out(f"prefetcht1 ({_AHEAD})")
    out(f"addq $$64, {_AHEAD}")
    out(f"decq {_SCRATCH}")
    out("jnz 2b")
    out("3:")
    for step in range(steps):
        for column in range(vectors):
            out(f"vmovups {64 * (step * vectors + column)}({_PANEL}), %zmm{column}")
        for row in range(height):
            for column in range(vectors):
                out(f"{multiply} {_operand(row, step)}{{1to16}}, %zmm{column}, {sums[row][column]}")
    for base in [_X, *bases]:
        out(f"addq {_STRIDE}, {base}")
    out(f"addq $${64 * vectors * steps}, {_PANEL}")
    out(f"decq {_STRIPS}")
    out("jnz 1b")
    each_place("vmovups {sum}, {place}")
    return "\n".join(lines)


def product(multiply: str, vectors: int, steps: int) -> Any:
    """See `tailserve.engine.model.microkernel.product`; 1 <= rows <= TALLEST, `multiply` is one of MULTIPLY's."""

    @intrinsic
    def f(context, rows, x, x_stride, strip_stride, panel, out, out_stride, strips, add, ahead, lines):
        def codegen(own, builder, signature, args):
            count, *rest = args
            done = builder.append_basic_block("done")
            choice = builder.switch(count, done)
            # Registers that the code changes are outputs too.
            kind = ir.FunctionType(ir.LiteralStructType([_I64] * _OPERANDS), [_I64] * _OPERANDS)
            inputs = ",".join(str(n) for n in range(_OPERANDS))
            clobbered = ",".join(f"~{{{name}}}" for name in ("r12", "r13", "r14", "r15", *(f"zmm{n}" for n in range(32))))
            constraints = ",".join(["=r"] * _OPERANDS) + f",{inputs},~{{memory}},~{{flags}},{clobbered}"
            for height in range(1, TALLEST + 1):
                block = builder.append_basic_block(f"rows{height}")
                choice.add_case(ir.Constant(_I64, height), block)
                builder.position_at_end(block)
                code = _tile(height, vectors, steps, multiply)
                builder.call(ir.InlineAsm(kind, code, constraints, side_effect=True), rest)
                builder.branch(done)
            builder.position_at_end(done)
            return own.get_dummy_value()

        return types.void(*[types.intp] * 11), codegen

    return f
