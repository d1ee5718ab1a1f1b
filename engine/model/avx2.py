"""Matrix products in AVX2: 6 rows of 16 columns at once, or 2 of 32. bfloat16 is computed as float32, half by half.

A pair of bfloat16 in 4 bytes is two float32: the pair moved up by 16 bits, and its upper 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import llvmlite.binding

from tailserve.engine.model import assembly

_FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_AVX2 = bool(_FEATURES.get("avx2")) and bool(_FEATURES.get("fma"))

TALLEST = 6
"""Rows of a tile: its 12 sums, two registers of a panel, one of x and a mask are all that there are."""

_AVX2 = assembly.InstructionSet("ymm", 32, 16, TALLEST, lambda height: 2 if height <= 2 else 1)
_MASK = "%ymm3"
_X = "%ymm2"
_PANEL = ("%ymm0", "%ymm1", "%ymm4", "%ymm5")
"""The last two where a tile of few rows leaves them."""


def product(kind: Literal["float32", "bfloat16"], vectors: int, steps: int) -> Any:
    """See `tailserve.engine.model.microkernel.product`; 1 <= rows <= TALLEST."""
    return assembly.product(_AVX2, assembly.Code(_whole) if kind == "float32" else _bfloat16(steps), vectors, steps)


def _whole(number: int, address: int, sums: Sequence[Sequence[str]]) -> list[str]:
    panel = _PANEL[: len(sums[0])]
    lines = [f"vmovups {address + 32 * n}({assembly.PANEL}), {name}" for n, name in enumerate(panel)]
    for row, own in enumerate(sums):
        lines.append(f"vbroadcastss {assembly.operand(row, number)}, {_X}")
        lines += _multiply(panel, own)
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
        panel, lines = _PANEL[: len(sums[0])], []
        for half in range(2):
            for n, name in enumerate(panel):
                place = f"{address + 32 * n}({assembly.PANEL})"
                lines += (
                    [f"vpand {place}, {_MASK}, {name}"]
                    if half
                    else [f"vmovdqu {place}, {name}", f"vpslld $$16, {name}, {name}"]
                )
            for row, own in enumerate(sums):
                lines.append(f"vbroadcastss {4 * (row * numbers + 2 * number + half)}(%rsp), {_X}")
                lines += _multiply(panel, own)
        return lines

    mask = [f"vpcmpeqd {_MASK}, {_MASK}, {_MASK}", f"vpslld $$16, {_MASK}, {_MASK}"]
    return assembly.Code(step, widen, mask, stack=4 * TALLEST * numbers)


def _multiply(panel: Sequence[str], sums: Sequence[str]) -> list[str]:
    return [f"vfmadd231ps {_X}, {name}, {total}" for name, total in zip(panel, sums, strict=True)]
