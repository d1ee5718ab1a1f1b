"""Keeps the threads of a team apart, each on a CPU of its own.

Where they share a machine, Linux may put two of them on one CPU while another process has a CPU for a moment, and may take
tens of milliseconds to part them: steps of twice the time. A team that has all CPUs of its process knows better.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tailserve.engine.model.llvm import call

_BYTES = 128
"""Of a set of CPUs, a bit for each, as Linux takes it."""


def cpu_sets(threads: int) -> npt.NDArray[np.uint8]:
    """[threads + 1, bytes]: a set of one CPU for each thread, and one more to keep another set in.

    No rows where threads may be moved: where there are CPUs to spare, another team could have picked the same ones.
    """
    allowed = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    sets = np.zeros((threads + 1, _BYTES), np.uint8)
    if threads < 2 or threads != len(allowed) or allowed[-1] >= 8 * _BYTES:
        return sets[:0]
    for thread, cpu in enumerate(allowed):
        sets[thread, cpu // 8] |= 1 << cpu % 8
    return sets


@intrinsic
def note_cpus(context, cpus):
    """Writes the set of CPUs that the calling thread may run on to an address."""
    return types.void(types.intp), _asks_linux("sched_getaffinity")


@intrinsic
def stay_on(context, cpus):
    """The calling thread runs on the CPUs of the set at an address from now on; where that is refused, nothing changes."""
    return types.void(types.intp), _asks_linux("sched_setaffinity")


def _asks_linux(name: str) -> Callable[..., Any]:
    def codegen(own, builder, signature, args):
        if sys.platform == "linux":
            # This thread; what follows is the set's size.
            own_number, size = ir.Constant(ir.IntType(32), 0), ir.Constant(ir.IntType(64), _BYTES)
            call(builder, name, ir.IntType(32), own_number, size, args[0])
        return own.get_dummy_value()

    return codegen
