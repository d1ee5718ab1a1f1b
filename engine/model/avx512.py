"""Matrix products in AVX-512: 12 rows of 32 columns at once, each row's numbers a broadcast operand of the product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding

from tailserve.engine.model import assembly

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

_AVX512 = assembly.InstructionSet("zmm", 64, 32, TALLEST, lambda height: 2)


def product(multiply: str, vectors: int, steps: int) -> Any:
    """See `tailserve.engine.model.microkernel.product`; 1 <= rows <= TALLEST, `multiply` is one of MULTIPLY's."""

    def step(number: int, address: int, sums: Sequence[Sequence[str]]) -> list[str]:
        columns = range(len(sums[0]))
        lines = [f"vmovups {address + 64 * column}({assembly.PANEL}), %zmm{column}" for column in columns]
        for row, own in enumerate(sums):
            x = f"{assembly.operand(row, number)}{{1to16}}"
            lines += [f"{multiply} {x}, %zmm{column}, {own[column]}" for column in columns]
        return lines

    return assembly.product(_AVX512, assembly.Code(step), vectors, steps)
