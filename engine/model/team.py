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

MANY = 32
"""Tasks that are plenty for a team: tokens are taken in portions rather than in more of them."""

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
def rows_of(tokens, share, shares):  # pragma: no cover
    """A share's first token, and the first behind it."""
    return tokens * share // shares, tokens * (share + 1) // shares


@njit(cache=True, nogil=True)
def columns_of(panels, team):  # pragma: no cover
    """Tasks that each thread's share of a product with so many panels has."""
    _, threads, by_rows, _ = team
    return panels if by_rows else (panels + threads - 1) // threads


@njit(cache=True, nogil=True)
def place_of(task, count, panels, tokens, team):  # pragma: no cover
    """The panel of one of these tasks, the first token of its rows, and the first behind them; no panel has no rows."""
    _, threads, by_rows, _ = team
    if by_rows:
        first, end = rows_of(tokens, task // count, threads)
        return task % count, first, end
    return task, 0, tokens if task < panels else 0


@njit(cache=True, nogil=True)
def portions(tokens, team):  # pragma: no cover
    """In how many portions of how many tokens a team takes those of each share."""
    most = (tokens + team[1] - 1) // team[1]
    some = 1 + most * team[1] // MANY
    return (most + some - 1) // some, some


@njit(cache=True, nogil=True)
def portion(task, count, some, tokens, team):  # pragma: no cover
    """The first token of a task that is one of `portions`, and the first behind it."""
    first, end = rows_of(tokens, task // count, team[1])
    begin = first + task % count * some
    return min(begin, end), min(begin + some, end)


@njit(cache=True, nogil=True)
def take(team, count):  # pragma: no cover
    """The number of the next task, of `count` in each share: of a thread's own share first, then of the others'.

    The tasks of share s are s * count and on; what is no task's number means that none is left.
    """
    member, threads, _, lines = team
    for n in range(member, member + threads):
        share = n % threads
        task = _raise(lines + share * LINE, 1) % _DONE
        if task < count:
            return share * count + task
    return threads * count


@njit(cache=True, nogil=True)
def take_next(team, count, task):  # pragma: no cover
    """Likewise, when `task` is done."""
    _raise(team[3] + task // count * LINE, _DONE)
    return take(team, count)


@njit(cache=True, nogil=True)
def meet(team, count):  # pragma: no cover
    """Returns when all tasks are done, and what they wrote is there to be read."""
    _, threads, _, lines = team
    for share in range(threads):
        while _look(lines + share * LINE) // _DONE < count:
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
