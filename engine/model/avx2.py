"""Matrix products in AVX2: 6 rows of 16 columns at once, or 3 of 32. bfloat16 is computed as float32, half by half.

A pair of bfloat16 in 4 bytes is two float32: the pair moved up by 16 bits, and its upper 16 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import llvmlite.binding

from tailserve.engine.model import assembly

_FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_AVX2 = bool(_FEATURES.get("avx2")) and bool(_FEATURES.get("fma"))

TALLEST = 6
"""Rows of a tile: its 12 sums, two registers of a panel, one of x and a mask are all that there are."""

_AVX2 = assembly.InstructionSet("ymm", 32, 16, TALLEST, lambda height: 2 if height <= 3 else 1)
_MASK = "%ymm3"
_X = "%ymm2"
_PANEL = ("%ymm0", "%ymm1", "%ymm4", "%ymm5")
"""The last two where a tile of few rows leaves them."""
_OTHERS = 2
"""Registers of x and of the mask."""


def product(kind: Literal["float32", "bfloat16"], vectors: int, steps: int) -> Any:
    """See `tailserve.engine.model.microkernel.product`; 1 <= rows <= TALLEST."""
    return assembly.product(_AVX2, assembly.Code(_whole) if kind == "float32" else _bfloat16(steps), vectors, steps)


def _whole(number: int, address: int, sums: Sequence[Sequence[str]]) -> list[str]:
    lines = []
    for begin, panel in _pieces(sums):
        lines += [f"vmovups {address + 32 * n}({assembly.PANEL}), {name}" for n, name in enumerate(panel, begin)]
        for row, own in enumerate(sums):
            lines.append(f"vbroadcastss {assembly.operand(row, number)}, {_X}")
            lines += _multiply(panel, own[begin:])
    return lines


def _bfloat16(steps: int) -> assembly.Code:
    """Each strip of x becomes float32 on the stack first: its rows are read by both halves, and for all columns."""
    numbers = 2 * steps

    def widen(height: int) -> list[str]:
        lines = []
        for row in range(height):
            for n in range(0, numbers, 8):
                lines += [f"vpmovzxwd {assembly.operand(row, n // 2)}, {_X}", f"vpslld $$16, {_X}, {_X}"]
                lines.append(f"vmovups {_X}, {4 * (row * numbers + n)}(%rsp)")
        return lines

    def step(number: int, address: int, sums: Sequence[Sequence[str]]) -> list[str]:
        lines = []
        for half, (begin, panel) in itertools.product(range(2), _pieces(sums)):
            for n, name in enumerate(panel, begin):
                place = f"{address + 32 * n}({assembly.PANEL})"
                lines += (
                    [f"vpand {place}, {_MASK}, {name}"]
                    if half
                    else [f"vmovdqu {place}, {name}", f"vpslld $$16, {name}, {name}"]
                )
            for row, own in enumerate(sums):
                lines.append(f"vbroadcastss {4 * (row * numbers + 2 * number + half)}(%rsp), {_X}")
                lines += _multiply(panel, own[begin:])
        return lines

    mask = [f"vpcmpeqd {_MASK}, {_MASK}, {_MASK}", f"vpslld $$16, {_MASK}, {_MASK}"]
    return assembly.Code(step, widen, mask, stack=4 * TALLEST * numbers)


def _pieces(sums: Sequence[Sequence[str]]) -> list[tuple[int, Sequence[str]]]:
    """The registers of a panel's columns, as many at a time as the sums leave, and the first column of each piece."""
    width = len(sums[0])
    panel = _PANEL[: min(width, _AVX2.registers - len(sums) * width - _OTHERS)]
    return [(begin, panel) for begin in range(0, width, len(panel))]


def _multiply(panel: Sequence[str], sums: Sequence[str]) -> list[str]:
    return [f"vfmadd231ps {_X}, {name}, {total}" for name, total in zip(panel, sums, strict=False)]
