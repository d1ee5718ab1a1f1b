"""The frame of a matrix product's inner loop in x86 assembly: a few rows times one panel of packed columns.

The sums of a tile fill the vector registers to the last one. A compiler's scheduler loads what they are made of ahead
instead, which spills them: a third of the speed. What a step computes is up to the instruction set, see
`tailserve.engine.model.avx512` and `avx2`; see `microkernel` for what the whole computes, and for other CPUs.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

llvmlite.binding.initialize_native_asmparser()

_I64 = ir.IntType(64)
_OPERANDS = 10
_X, _ROW, _STRIDE, PANEL, _OUT, _OUT_STRIDE, _STRIPS, _ADD, _AHEAD, _LINES = (f"${n}" for n in range(_OPERANDS))
_SCRATCH = "%r15"
_LOAD, _STORE = "vmovups {place}, {sum}", "vmovups {sum}, {place}"


class InstructionSet(NamedTuple):
    """How a CPU computes a tile."""

    register: str
    """Its vector registers: zmm or ymm."""
    size: int
    """Bytes of each."""
    registers: int
    """How many there are; a tile's sums are the last of them."""
    tallest: int
    """Rows of a tile, at most."""
    columns: Callable[[int], int]
    """Of so many rows: in how many pieces of 64 bytes of columns a tile may be wide."""


class Code(NamedTuple):
    """What a tile does, in the registers of its sums [rows][registers]."""

    step: Callable[[int, int, Sequence[Sequence[str]]], list[str]]
    """One step: its number in the strip, and the address in `PANEL` of its columns."""
    strip: Callable[[int], list[str]] = lambda height: []
    """Before the steps of each strip of so many rows."""
    begin: Sequence[str] = ()
    """Once."""
    stack: int = 0
    """Bytes at %rsp that the other code uses."""


_RED_ZONE = 128
"""Bytes below the stack's end that the surrounding code may use."""


def operand(row: int, step: int) -> str:
    """Address of a row's 4 bytes. Three rows share a base register: a register of its own for each there are not."""
    base = (_X, "%r12", "%r13", "%r14")[row // 3]
    index = ("", f",{_ROW}", f",{_ROW},2")[row % 3]
    return f"{4 * step}({base}{index})"


def _tile(isa: InstructionSet, height: int, vectors: int, steps: int, code: Code) -> str:
    """The assembly of one tile; `steps` steps of 4 bytes of each row are a strip.

    Where the registers do not hold the sums of all columns, each strip does some columns after the others.
    """
    some = min(isa.columns(height), vectors)
    width = some * 64 // isa.size
    first = isa.registers - height * width
    sums = [[f"%{isa.register}{first + row * width + n}" for n in range(width)] for row in range(height)]
    bases = [base for base in ("%r12", "%r13", "%r14") if base in "".join(operand(row, 0) for row in range(height))]
    lines: list[str] = []

    def out(line: str) -> None:
        lines.append(line)

    def each_place(move: str, column: int = 0) -> None:
        out(f"movq {_OUT}, {_SCRATCH}")
        for row in sums:
            for n, name in enumerate(row):
                out(move.format(place=f"{64 * column + isa.size * n}({_SCRATCH})", sum=name))
            out(f"addq {_OUT_STRIDE}, {_SCRATCH}")

    before = _X
    for base in bases:
        out(f"leaq ({before},{_ROW},2), {base}")
        out(f"addq {_ROW}, {base}")
        before = base
    if code.stack:
        out(f"leaq -{code.stack + _RED_ZONE}(%rsp), %rsp")
    lines += code.begin
    zero = "vpxord" if isa.size == 64 else "vpxor"
    lines += [f"{zero} {name}, {name}, {name}" for row in sums for name in row]
    # What is asked for ahead comes in small steps, two for each step over all columns: lines of another panel that are asked
    # for at once take the buffers that this panel's own lines have to come through, and products wait for memory.
    out(f"imulq $${64 // (2 * steps)}, {_LINES}, {_LINES}")
    out(f"testq {_ADD}, {_ADD}")
    if some == vectors:
        out("jz 1f")
        each_place(_LOAD)
    else:
        out("jnz 1f")
        for column in range(0, vectors, some):
            each_place(_STORE, column)
    out("1:")
    lines += code.strip(height)
    for column in range(0, vectors, some):
        if some < vectors:
            each_place(_LOAD, column)
        for n in range(steps):
            for _ in range(2 * some // vectors):
                out(f"prefetcht1 ({_AHEAD})")
                out(f"addq {_LINES}, {_AHEAD}")
            lines += code.step(n, 64 * (n * vectors + column), sums)
        if some < vectors:
            each_place(_STORE, column)
    for base in [_X, *bases]:
        out(f"addq {_STRIDE}, {base}")
    out(f"addq $${64 * vectors * steps}, {PANEL}")
    out(f"decq {_STRIPS}")
    out("jnz 1b")
    if some == vectors:
        each_place(_STORE)
    if code.stack:
        out(f"leaq {code.stack + _RED_ZONE}(%rsp), %rsp")
    return "\n".join(lines)


def product(isa: InstructionSet, code: Code, vectors: int, steps: int) -> Any:
    """See `tailserve.engine.model.microkernel.product`; 1 <= rows <= isa.tallest."""
    # Registers that the code changes are outputs too.
    kind = ir.FunctionType(ir.LiteralStructType([_I64] * _OPERANDS), [_I64] * _OPERANDS)
    inputs = ",".join(str(n) for n in range(_OPERANDS))
    changed = ("r12", "r13", "r14", "r15", *(f"{isa.register}{n}" for n in range(isa.registers)))
    clobbered = ",".join(f"~{{{name}}}" for name in changed)
    constraints = ",".join(["=r"] * _OPERANDS) + f",{inputs},~{{memory}},~{{flags}},{clobbered}"

    @intrinsic
    def f(context, rows, x, x_stride, strip_stride, panel, out, out_stride, strips, add, ahead, lines):
        def codegen(own, builder, signature, args):
            count, *rest = args
            done = builder.append_basic_block("done")
            choice = builder.switch(count, done)
            for height in range(1, isa.tallest + 1):
                block = builder.append_basic_block(f"rows{height}")
                choice.add_case(ir.Constant(_I64, height), block)
                builder.position_at_end(block)
                tile = _tile(isa, height, vectors, steps, code)
                builder.call(ir.InlineAsm(kind, tile, constraints, side_effect=True), rest)
                builder.branch(done)
            builder.position_at_end(done)
            return own.get_dummy_value()

        return types.void(*[types.intp] * 11), codegen

    return f
