"""How the threads of a kernel share work: they take tasks off a counter, and ask for memory ahead of its use.

Fixed shares would wait for the thread that another process has pushed off its core: on a small machine, at every step.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tailserve.engine.model.llvm import call, pointer


@intrinsic
def take(context, counter):
    """The number at an address of 8 bytes, which goes up by one for the next to come."""

    def codegen(own, builder, signature, args):
        place = pointer(builder, args[0], ir.IntType(64))
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.intp(types.intp), codegen


@intrinsic
def prefetch(context, address):
    """Asks for the cache line at an address, whether or not there is memory, into the second level."""

    def codegen(own, builder, signature, args):
        into = [ir.Constant(ir.IntType(32), value) for value in (0, 2, 1)]
        call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, args[0], ir.IntType(8)), *into)
        return own.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def cycles(context):
    """The CPU's clock: ticks at a constant rate since some time. 0 where programs may not read it (ARM)."""

    def codegen(own, builder, signature, args):
        if platform.machine() not in ("x86_64", "AMD64"):
            return ir.Constant(ir.IntType(64), 0)
        return call(builder, "llvm.readcyclecounter", ir.IntType(64))

    return types.int64(), codegen
