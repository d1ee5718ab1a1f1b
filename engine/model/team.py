"""How the threads of a step share work: all run the whole step, take tasks off counters, and go on when all are done.

Fixed shares would wait for the thread that another process has pushed off its core: on a small machine, at every step. For
the same reason nobody waits for threads, only for tasks: one that comes late finds no work and catches up. So whatever is
written must be a task of some kernel; what a thread does beside them, the others are past already.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg"

from __future__ import annotations

import platform

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from tailserve.engine.model.llvm import call, pointer

LINE = 64
"""Bytes at 0 that threads share work by: a cache line, of which 8 bytes are in use. Each kernel has one for each thread."""

OWN_ROWS = 24
"""Tokens for each thread from which on it keeps to tokens of its own, and reads all weights, rather than to some columns of
all tokens: they stay in its caches, which another core's are far from; with fewer, memory would be what it waits for."""

_DONE = 1 << 32
"""The lower half of a line's number counts the tasks that were taken, the upper half those that are done."""


@intrinsic
def _raise(context, place, value):
    """The number at an address of 8 bytes, which goes up by a value for the next to come."""

    def codegen(own, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], ir.IntType(64)), args[1], "acq_rel")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def _look(context, place):
    """The number at an address of 8 bytes that others raise; for loops."""

    def codegen(own, builder, signature, args):
        if platform.machine() in ("x86_64", "AMD64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return builder.load_atomic(pointer(builder, args[0], ir.IntType(64)), "acquire", 8)

    return types.intp(types.intp), codegen


@njit(cache=True, nogil=True)
def team_of(member, threads, tokens, lines):  # pragma: no cover
    """What a thread knows of a team for a batch: its number, of how many, whether products are shared out by rows, and the
    address of the lines."""
    return member, threads, tokens >= threads * OWN_ROWS, lines


@njit(cache=True, nogil=True)
def later(team, kernels):  # pragma: no cover
    """A team as it is so many kernels later: each has lines of its own."""
    member, threads, by_rows, lines = team
    return member, threads, by_rows, lines + kernels * threads * LINE


@njit(cache=True, nogil=True)
def share_of(share, total, threads):  # pragma: no cover
    """Of so many tasks, or rows, the first of a thread's own, and the first behind them."""
    return total * share // threads, total * (share + 1) // threads


@njit(cache=True, nogil=True)
def owner_of(task, total, threads):  # pragma: no cover
    """The thread whose share a task is in."""
    return (threads * (task + 1) - 1) // total


@njit(cache=True, nogil=True)
def tasks_of(panels, team):  # pragma: no cover
    """Tasks of a product with so many panels."""
    return panels * team[1] if team[2] else panels


@njit(cache=True, nogil=True)
def place_of(task, panels, tokens, team):  # pragma: no cover
    """The panel of one of these tasks, its first row, and the first behind its rows."""
    _, threads, by_rows, _ = team
    if by_rows:
        first, end = share_of(task // panels, tokens, threads)
        return task % panels, first, end
    return task, 0, tokens


@njit(cache=True, nogil=True)
def take(team, total):  # pragma: no cover
    """The next of so many tasks, of a thread's own share first, then of the others'; `total` if none is left."""
    member, threads, _, lines = team
    for n in range(member, member + threads):
        share = n % threads
        first, end = share_of(share, total, threads)
        task = first + _raise(lines + share * LINE, 1) % _DONE
        if task < end:
            return task
    return total


@njit(cache=True, nogil=True)
def take_next(team, total, task):  # pragma: no cover
    """Likewise, when `task` is done; of the same share while it lasts."""
    _, threads, _, lines = team
    share = owner_of(task, total, threads)
    first, end = share_of(share, total, threads)
    task = first + _raise(lines + share * LINE, _DONE + 1) % _DONE
    return task if task < end else take(team, total)


@njit(cache=True, nogil=True)
def meet(team, total):  # pragma: no cover
    """Returns when all tasks are done, and what they wrote is there to be read."""
    _, threads, _, lines = team
    for share in range(threads):
        first, end = share_of(share, total, threads)
        while _look(lines + share * LINE) // _DONE < end - first:
            pass


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
