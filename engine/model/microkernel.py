"""The inner loop of every matrix product on a CPU: a few rows times one panel of packed columns.

The blocking is that of Goto and van de Geijn (Anatomy of high-performance matrix multiplication, 2008): a panel streams
through once, and each of its vectors is used by every row of the tile.

A panel holds 16 * `vectors` columns, 4 bytes of each column in a step: one float32 or two bfloat16 of consecutive k. So both
kinds walk memory alike: 4 bytes of x a row, 64 * `vectors` bytes of the panel. `steps` steps of x are a strip.

CPUs with AVX-512 or AVX2 run `tailserve.engine.model.avx512` or `avx2`; here is what any CPU can run, as LLVM code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tailserve.engine.model import avx2, avx512
from tailserve.engine.model.amx import HAS_AMX
from tailserve.engine.model.llvm import call, pointer


# Numba's cache looks at the file of a function, not at the files of those it calls: compiled code would outlive a change of
# them. So each state of these sources has a cache of its own, and so has a process that may not use what its CPU can.
def _cache_folder() -> Path:
    """Beside the sources; in the user's cache where those are not to be written to."""
    beside = Path(__file__).parent
    return beside / "__pycache__" if os.access(beside, os.W_OK) else Path.home() / ".cache" / "tailserve"


_sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
_sets = {"amx": HAS_AMX, "bf16": avx512.HAS_BF16_DOT, "avx512": avx512.HAS_AVX512, "avx2": avx2.HAS_AVX2}
_used = [name for name, has in _sets.items() if has]
_machine = "-".join([numba.__version__, llvmlite.binding.get_host_cpu_name(), *_used])
numba.config.CACHE_DIR = str(_cache_folder() / f"numba-{_sources.hexdigest()[:16]}-{_machine}")  # type: ignore[attr-defined]

Kind = Literal["float32", "bfloat16"]

LANES = 16
STRIP = 32
"""Columns of a strip of activations."""

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VF, _VI = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_Emit = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]

PORTABLE_HEIGHTS = (6, 4, 3, 2, 1)


def heights(kind: Kind) -> tuple[int, ...]:
    """The numbers of rows that a `product` takes, in descending order. Others are made of these."""
    if _has_avx512(kind):
        return tuple(range(avx512.TALLEST, 0, -1))
    return tuple(range(avx2.TALLEST, 0, -1)) if avx2.HAS_AVX2 else PORTABLE_HEIGHTS


def _has_avx512(kind: Kind) -> bool:
    return avx512.HAS_BF16_DOT if kind == "bfloat16" else avx512.HAS_AVX512


def product(kind: Kind, vectors: int, steps: int) -> Any:
    """A function `f(rows, x, x_stride, strip_stride, panel, out, out_stride, strips, add, ahead, lines)` for Numba code.

    out[rows, 16 * vectors], float32, is set to, or if `add` is not 0 raised by, x[rows, strips * steps] times the panel.
    `rows` is one of the kind's `heights`. The others are addresses, and strides in bytes: `x_stride` from row to row,
    `strip_stride` from a row's strip to its next. Meanwhile memory from `ahead` on may be asked for, so many cache lines for
    each strip, two for each of its steps at most.
    """
    if _has_avx512(kind):
        return avx512.product(avx512.MULTIPLY[kind], vectors, steps)
    return avx2.product(kind, vectors, steps) if avx2.HAS_AVX2 else portable_product(kind, vectors, steps)


def portable_product(kind: Kind, vectors: int, strip: int) -> Any:
    """`product` for any CPU."""
    emit = _EMITTERS[kind]

    @intrinsic
    def multiply(  # type: ignore[no-untyped-def]
        context, rows, x, x_stride, strip_stride, panel, out, out_stride, strips, add, ahead, lines
    ):
        def codegen(own, builder, signature, args):  # type: ignore[no-untyped-def]
            count, x, x_stride, strip_stride, panel, out, out_stride, strips, add, _, _ = args
            steps = builder.mul(strips, ir.Constant(_I64, strip))
            done = builder.append_basic_block("done")
            choice = builder.switch(count, done)
            for height in PORTABLE_HEIGHTS:
                block = builder.append_basic_block(f"rows{height}")
                choice.add_case(ir.Constant(_I64, height), block)
                builder.position_at_end(block)
                _tile(builder, height, vectors, strip, emit, x, x_stride, strip_stride, panel, out, out_stride, steps, add)
                builder.branch(done)
            builder.position_at_end(done)
            return own.get_dummy_value()

        return types.void(*[types.intp] * 11), codegen

    return multiply


def _tile(
    builder: ir.IRBuilder,
    height: int,
    vectors: int,
    strip: int,
    emit: _Emit,
    x: ir.Value,
    x_stride: ir.Value,
    strip_stride: ir.Value,
    panel: ir.Value,
    out: ir.Value,
    out_stride: ir.Value,
    steps: ir.Value,
    add: ir.Value,
) -> None:
    def address(base: ir.Value, stride: ir.Value, row: int) -> ir.Value:
        return builder.add(base, builder.mul(stride, ir.Constant(_I64, row)))

    def cell(row: int, column: int) -> ir.Value:
        place = builder.add(address(out, out_stride, row), ir.Constant(_I64, 64 * column))
        return pointer(builder, place, _VF)

    cells = [(row, column) for row in range(height) for column in range(vectors)]
    zero = ir.Constant(_VF, None)
    wanted = builder.icmp_signed("!=", add, ir.Constant(_I64, 0))
    begins = [builder.select(wanted, builder.load(cell(*at), align=4), zero) for at in cells]
    before = builder.block
    loop, after = builder.append_basic_block("step"), builder.append_basic_block("store")
    builder.branch(loop)
    builder.position_at_end(loop)
    step, there = (builder.phi(_I64) for _ in range(2))
    sums = [builder.phi(_VF) for _ in cells]
    weights = []
    for column in range(vectors):
        place = builder.add(there, ir.Constant(_I64, 64 * column))
        weights.append(builder.load(pointer(builder, place, _VI), align=4))
    ends = []
    of_strip = builder.mul(builder.udiv(step, ir.Constant(_I64, strip)), strip_stride)
    in_strip = builder.mul(builder.urem(step, ir.Constant(_I64, strip)), ir.Constant(_I64, 4))
    here = builder.add(x, builder.add(of_strip, in_strip))
    undefined = ir.Constant(_VI, ir.Undefined)
    for row in range(height):
        scalar = builder.load(pointer(builder, address(here, x_stride, row), _I32), align=4)
        first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        spread = builder.shuffle_vector(first, undefined, ir.Constant(_VI, None))
        ends += [emit(builder, sums[row * vectors + column], weights[column], spread) for column in range(vectors)]
    next_step = builder.add(step, ir.Constant(_I64, 1))
    next_there = builder.add(there, ir.Constant(_I64, 64 * vectors))
    builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, after)
    for phi, begin, end in zip(
        [step, there, *sums],
        [ir.Constant(_I64, 0), panel, *begins],
        [next_step, next_there, *ends],
        strict=True,
    ):
        phi.add_incoming(begin, before)
        phi.add_incoming(end, loop)
    builder.position_at_end(after)
    for at, end in zip(cells, ends, strict=True):
        builder.store(end, cell(*at), align=4)


def _float32(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
    return call(builder, "llvm.fma.v16f32", _VF, builder.bitcast(weights, _VF), builder.bitcast(x, _VF), total)


def _bfloat16(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
    high, low = ir.Constant(_VI, [-65536] * LANES), ir.Constant(_VI, [16] * LANES)
    total = _float32(builder, total, builder.shl(weights, low), builder.shl(x, low))
    return _float32(builder, total, builder.and_(weights, high), builder.and_(x, high))


_EMITTERS: dict[str, _Emit] = {"float32": _float32, "bfloat16": _bfloat16}
