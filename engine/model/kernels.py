"""The parts of a decoder's step on a CPU, compiled by Numba: products, norms, rotary embeddings.

Activations lie in strips of 32 columns, [columns / 32, tokens, 32], so that a tile of them, and what a task writes, is one
piece of memory. They are float32, or bfloat16 as its bits in uint16; sums, norms and softmax are float32. No result depends
on what else is in the batch: a row's sums run in the same order in every batch shape.

All threads of a `team` call each kernel (see `tailserve.engine.model.team`).

Memory is addressed by numbers where threads share it: a view of an array would count references, and the threads would
contend for the counter.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from tailserve.engine.model.microkernel import LANES
from tailserve.engine.model.noise import log_exponential
from tailserve.engine.model.team import meet, place_of, take, take_next, tasks_of
from tailserve.engine.model.tiles import COLUMNS, MAX_ROWS, multiply
from tailserve.engine.model.vectors import exp, fma, get, hold, larger, peak, read, spread, total, write, write_narrow

AHEAD = 4096
"""Bytes between what is read and what is asked for, where a panel is read once. Where several passes read it, the next panel
is asked for meanwhile."""

SEARCH = 1024
"""Columns that are looked at one by one where their largest is the largest so far."""


def put(like, address, value):
    """Writes 16 numbers in the type of the array `like`."""
    raise NotImplementedError


@overload(put, inline="always")
def _put(like, address, value):  # pragma: no cover
    if like.dtype == types.uint16:
        return lambda like, address, value: write_narrow(address, value)
    return lambda like, address, value: write(address, value)


@njit(cache=True, nogil=True)
def _ahead_of(panel, strips, rows):  # pragma: no cover
    """How a panel of so many bytes is asked for while rows are multiplied: cache lines in each strip, bytes in each pass."""
    passes = (rows + MAX_ROWS - 1) // MAX_ROWS
    lines = panel // (64 * strips)
    return (lines + passes - 1) // passes, panel // passes // 64 * 64


@njit(cache=True, nogil=True)
def linear(x, panels, layer, out, strip_stride, row_stride, add, team):  # pragma: no cover
    """x [K / 32, T, 32] times panels [L, P, steps, 32 * pair] of one layer, to float32 at the address `out`.

    The product sets what is there, or if `add` is not 0 raises it. Strides in bytes: from 32 columns of a row to its next
    32, and from row to row.
    """
    tokens, count, steps = x.shape[1], panels.shape[1], panels.shape[2]
    base, stride = panels.ctypes.data + layer * panels.strides[0], panels.strides[1]
    tasks = tasks_of(count, team)
    task = take(team, tasks)
    while task < tasks:
        panel, first, end = place_of(task, count, tokens, team)
        here = base + panel * stride
        lines, part = _ahead_of(stride, x.shape[0], end - first)
        ahead = here + (AHEAD if end - first <= MAX_ROWS else stride)
        for begin in range(first, end, MAX_ROWS):
            place = out + panel * strip_stride + begin * row_stride
            multiply(x, begin, min(MAX_ROWS, end - begin), here, steps, place, row_stride, add, ahead, lines)
            ahead += part
        task = take_next(team, tasks, task)
    meet(team, tasks)


@njit(cache=True, nogil=True)
def gated(x, panels, layer, out, team):  # pragma: no cover
    """out [P / 2, T, 32] = silu(gate) * up; panels of gate and of up take turns."""
    tokens, count, steps = x.shape[1], panels.shape[1] // 2, panels.shape[2]
    base, stride = panels.ctypes.data + layer * panels.strides[0], panels.strides[1]
    target, size, strip = out.ctypes.data, out.itemsize, out.strides[0]
    one, zeros = spread(np.float32(1.0)), spread(np.float32(0.0))
    gate, up = np.empty(MAX_ROWS * COLUMNS, np.float32), np.empty(MAX_ROWS * COLUMNS, np.float32)
    gates, ups = gate.ctypes.data, up.ctypes.data
    tasks = tasks_of(count, team)
    task = take(team, tasks)
    while task < tasks:
        panel, first, end = place_of(task, count, tokens, team)
        here = base + 2 * panel * stride
        lines, part = _ahead_of(stride, x.shape[0], end - first)
        ahead = here + (AHEAD if end - first <= MAX_ROWS else 2 * stride)
        for begin in range(first, end, MAX_ROWS):
            rows = min(MAX_ROWS, end - begin)
            multiply(x, begin, rows, here, steps, gates, 4 * COLUMNS, 0, ahead, lines)
            multiply(x, begin, rows, here + stride, steps, ups, 4 * COLUMNS, 0, ahead + stride, lines)
            ahead += part
            place = target + panel * strip + begin * COLUMNS * size
            for i in range(0, rows * COLUMNS, LANES):
                g = read(gates + i * 4)
                put(out, place + i * size, g / (one + exp(zeros - g)) * read(ups + i * 4))
        task = take_next(team, tasks, task)
    hold(gate)
    hold(up)
    meet(team, tasks)


@njit(cache=True, nogil=True)
def embed(token_ids, panels, hidden, team):  # pragma: no cover
    """hidden [H / 32, T, 32], float32: the columns `token_ids` of panels [1, P, steps, 32 * pair]."""
    tokens = len(token_ids)
    pair = panels.shape[3] // COLUMNS
    bits = hidden.view(np.uint32)
    t = take(team, tokens)
    while t < tokens:
        panel, column = token_ids[t] // COLUMNS, token_ids[t] % COLUMNS * pair
        for i in range(hidden.shape[0] * COLUMNS):
            if pair == 2:
                bits[i // COLUMNS, t, i % COLUMNS] = np.uint32(panels[0, panel, i // 2, column + i % 2]) << np.uint32(16)
            else:
                hidden[i // COLUMNS, t, i % COLUMNS] = panels[0, panel, i, column]
        t = take_next(team, tokens, t)
    meet(team, tokens)


@njit(cache=True, nogil=True)
def pick_rows(hidden, rows, out, team):  # pragma: no cover
    """out [H / 32, N, 32] = the tokens `rows` of hidden."""
    tokens = len(rows)
    n = take(team, tokens)
    while n < tokens:
        for strip in range(hidden.shape[0]):
            for column in range(COLUMNS):
                out[strip, n, column] = hidden[strip, rows[n], column]
        n = take_next(team, tokens, n)
    meet(team, tokens)


@njit(cache=True, nogil=True)
def copy_in(x, hidden, team):  # pragma: no cover
    """hidden [H / 32, T, 32] = float32 x [T, H]."""
    tokens = len(x)
    t = take(team, tokens)
    while t < tokens:
        for i in range(x.shape[1]):
            hidden[i // COLUMNS, t, i % COLUMNS] = x[t, i]
        t = take_next(team, tokens, t)
    meet(team, tokens)


@njit(cache=True, nogil=True)
def copy_out(hidden, out, begin, team):  # pragma: no cover
    """The columns from `begin` on of float32 out [T, ...] = hidden [H / 32, T, 32]."""
    tokens = hidden.shape[1]
    t = take(team, tokens)
    while t < tokens:
        for strip in range(hidden.shape[0]):
            for column in range(COLUMNS):
                out[t, begin + strip * COLUMNS + column] = hidden[strip, t, column]
        t = take_next(team, tokens, t)
    meet(team, tokens)


@njit(cache=True, nogil=True)
def norm(like, x, x_stride, weight, strips, epsilon, out, out_stride):  # pragma: no cover
    """RMSNorm (Zhang and Sennrich 2019) of one row of strips, from address to address, in the type of the array `like`."""
    squares = spread(np.float32(0.0))
    for s in range(strips):
        a, b = read(x + s * x_stride), read(x + s * x_stride + 64)
        squares = fma(b, b, fma(a, a, squares))
    scale = spread(np.float32(1.0) / np.sqrt(total(squares) / np.float32(strips * COLUMNS) + epsilon))
    size = like.itemsize
    for s in range(strips):
        a, b = read(x + s * x_stride), read(x + s * x_stride + 64)
        put(like, out + s * out_stride, a * scale * read(weight + s * 128))
        put(like, out + s * out_stride + LANES * size, b * scale * read(weight + s * 128 + 64))


@njit(cache=True, nogil=True)
def norm_all(hidden, weight, epsilon, out, team):  # pragma: no cover
    """out [H / 32, T, 32] = RMSNorm of each token of hidden, likewise."""
    strips, tokens, size = hidden.shape[0], hidden.shape[1], out.itemsize
    x, w, target = hidden.ctypes.data, weight.ctypes.data, out.ctypes.data
    t = take(team, tokens)
    while t < tokens:
        place = target + t * COLUMNS * size
        norm(out, x + t * 128, hidden.strides[0], w, strips, epsilon, place, out.strides[0])
        t = take_next(team, tokens, t)
    meet(team, tokens)


@njit(cache=True, nogil=True)
def pick_all(logits, stride, columns, inverse_temperatures, keys, out, team):  # pragma: no cover
    """out [N] = index of the largest of logits / temperature - log of noise, of each row of float32 at the address `logits`.

    A row whose inverse temperature is 0 goes by its logits alone. keys [N, 2]. The first of equals. Memory behind a row's
    last column is read up to a whole vector.
    """
    scores = np.empty(SEARCH, np.float32)
    n = take(team, len(out))
    while n < len(out):
        row = logits + n * stride
        scale, low, high = inverse_temperatures[n], keys[n, 0], keys[n, 1]
        factor = spread(scale)
        best, place = np.float32(-np.inf), 0
        for begin in range(0, columns, SEARCH):
            end = min(begin + SEARCH, columns)
            source, lead = row + begin * 4, spread(best)
            if scale > 0:
                source = scores.ctypes.data
                for i in range(begin, end, LANES):
                    score = read(row + i * 4) * factor - log_exponential(i, low, high)
                    write(source + (i - begin) * 4, score)
                    lead = larger(lead, score)
            else:
                for i in range(begin, end, LANES):
                    lead = larger(lead, read(row + i * 4))
            if peak(lead) > best:
                for i in range(end - begin):
                    value = get(source + i * 4)
                    if value > best:
                        best, place = value, begin + i
        out[n] = place
        n = take_next(team, len(out), n)
    hold(scores)
    meet(team, len(out))
