"""Intel's matrix instructions (AMX) for Numba code: tiles of 16 rows of 64 bytes, and products of bfloat16 tiles.

See Intel's Software Developer's Manual, volume 1, chapter 18. A thread has 8 tiles, named by literal numbers. `configure`
gives them their sizes; `release` gives them back, since what a thread holds is saved at every context switch. Addresses and
strides are in bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import ctypes
import platform
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tailserve.engine.model.llvm import call, pointer

TILE = 16
"""Rows of a tile, and its columns of 4 bytes."""

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def _allowed() -> bool:
    features = llvmlite.binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")) or platform.system() != "Linux":
        return False
    # Linux gives a process tiles when it asks, since they make its threads' saved state 8 KB larger.
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


HAS_AMX = _allowed()
"""Whether this process may run what is below."""


def configuration(sizes: list[tuple[int, int]]) -> np.ndarray:
    """The 64 bytes for `configure`: (rows, bytes of a row) of each tile, in the order of their numbers."""
    out = np.zeros(64, np.uint8)
    out[0] = 1
    for tile, (rows, width) in enumerate(sizes):
        out[16 + 2 * tile] = width
        out[48 + tile] = rows
    return out


def _number(tile: types.IntegerLiteral) -> ir.Value:
    return ir.Constant(ir.IntType(8), tile.literal_value)


def _transfer(name: str) -> Any:
    def typed(context, tile, address, stride):
        def codegen(own, builder, signature, args):
            call(builder, name, ir.VoidType(), _number(tile), pointer(builder, args[1], ir.IntType(8)), args[2])
            return own.get_dummy_value()

        return types.void(tile, types.intp, types.intp), codegen

    return intrinsic(prefer_literal=True)(typed)


load = _transfer("llvm.x86.tileloadd64")
"""load(tile, address, stride): the tile's rows begin `stride` bytes after one another."""
save = _transfer("llvm.x86.tilestored64")
"""save(tile, address, stride): the opposite of `load`."""


@intrinsic
def configure(context, address):
    """Takes the tiles, with the sizes of a `configuration`."""

    def codegen(own, builder, signature, args):
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), pointer(builder, args[0], ir.IntType(8)))
        return own.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def release(context):
    """Gives the tiles back."""

    def codegen(own, builder, signature, args):
        call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return own.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def zero(context, tile):
    """tile = 0."""

    def codegen(own, builder, signature, args):
        call(builder, "llvm.x86.tilezero", ir.VoidType(), _number(tile))
        return own.get_dummy_value()

    return types.void(tile), codegen


@intrinsic(prefer_literal=True)
def dot(context, sums, x, panel):
    """sums [rows, 16], float32 += x [rows, 2 K], bfloat16, times panel [K, 16, 2]."""

    def codegen(own, builder, signature, args):
        call(builder, "llvm.x86.tdpbf16ps", ir.VoidType(), _number(sums), _number(x), _number(panel))
        return own.get_dummy_value()

    return types.void(sums, x, panel), codegen
