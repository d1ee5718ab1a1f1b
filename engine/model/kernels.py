"""The parts of a decoder's step on a CPU, compiled by Numba: products, norms, rotary embeddings.

Activations are float32 arrays, or bfloat16 as its bits in uint16; sums, norms and softmax are float32. No result depends on
what else is in the batch: a row's sums run in the same order in every batch shape. So one compiled loop serves few rows and
many: two would be vectorised differently, and round differently.

Memory is addressed by numbers where threads share it: a view of an array would count references, and the threads would
contend for the counter.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from tailserve.engine.model.tiles import COLUMNS, MAX_ROWS, multiply

FASTMATH = {"reassoc", "contract", "nsz", "nnan", "ninf"}
"""No approximate division: vectors would use it and what is left behind the last vector would not."""


def exp(x):  # pragma: no cover
    """e**x in float32 for x <= 88, to 2 units in the last place (Cephes, expf). Vectorises, unlike the library's."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * f + np.float32(c)
    p = p * f * f + f + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


exp = njit(cache=True, fastmath=FASTMATH, inline="always")(exp)


def store(target, row, column, line):
    """target[row, column : column + len(line)] = float32 line, rounded to nearest even where target is bfloat16.

    Unsigned indices, because Numba lets signed ones count from the end, and such loops do not vectorise.
    """
    raise NotImplementedError


@overload(store, inline="always")
def _store(target, row, column, line):  # pragma: no cover
    if target.dtype == types.uint16:

        def narrow(target, row, column, line):
            bits, r, c = line.view(np.uint32), np.uintp(row), np.uintp(column)
            for i in range(len(line)):
                odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
                target[r, c + np.uintp(i)] = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)

        return narrow

    def wide(target, row, column, line):
        r, c = np.uintp(row), np.uintp(column)
        for i in range(len(line)):
            target[r, c + np.uintp(i)] = line[i]

    return wide


@njit(parallel=True, cache=True, nogil=True)
def linear(x, panels, layer, out):  # pragma: no cover
    """out [T, 32 P], float32 = x [T, K] times panels [L, P, steps, 32 * pair] of one layer."""
    tokens, count, steps = x.shape[0], panels.shape[1], panels.shape[2]
    tiles = (tokens + MAX_ROWS - 1) // MAX_ROWS
    base, stride = panels.ctypes.data + layer * panels.strides[0], panels.strides[1]
    target, out_stride = out.ctypes.data, out.strides[0]
    for task in prange(count * tiles):
        panel, part = task // tiles, task % tiles
        begin = part * MAX_ROWS
        rows = min(MAX_ROWS, tokens - begin)
        multiply(x, begin, rows, base + panel * stride, steps, target + begin * out_stride + panel * 4 * COLUMNS, out_stride)


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def gated(x, panels, layer, out):  # pragma: no cover
    """out [T, 16 P] = silu(gate) * up; panels of gate and of up take turns."""
    tokens, count, steps = x.shape[0], panels.shape[1] // 2, panels.shape[2]
    tiles = (tokens + MAX_ROWS - 1) // MAX_ROWS
    base, stride = panels.ctypes.data + layer * panels.strides[0], panels.strides[1]
    for task in prange(count * tiles):
        panel, part = task // tiles, task % tiles
        begin = part * MAX_ROWS
        rows = min(MAX_ROWS, tokens - begin)
        gate, up = np.empty(MAX_ROWS * COLUMNS, np.float32), np.empty(MAX_ROWS * COLUMNS, np.float32)
        multiply(x, begin, rows, base + 2 * panel * stride, steps, gate.ctypes.data, 4 * COLUMNS)
        multiply(x, begin, rows, base + (2 * panel + 1) * stride, steps, up.ctypes.data, 4 * COLUMNS)
        # One long loop over all rows, since short ones of a known length are unrolled instead of vectorised.
        for i in range(rows * COLUMNS):
            gate[i] = gate[i] / (np.float32(1.0) + exp(min(-gate[i], np.float32(88.0)))) * up[i]
        for r in range(rows):
            store(out, begin + r, panel * COLUMNS, gate[r * COLUMNS : (r + 1) * COLUMNS])


@njit(cache=True, nogil=True)
def embed(token_ids, panels, hidden):  # pragma: no cover
    """hidden [T, H], float32: the columns `token_ids` of panels [1, P, steps, 32 * pair]."""
    pair = panels.shape[3] // COLUMNS
    bits = hidden.view(np.uint32)
    for t in range(len(token_ids)):
        panel, column = token_ids[t] // COLUMNS, token_ids[t] % COLUMNS * pair
        for i in range(hidden.shape[1]):
            if pair == 2:
                bits[t, i] = np.uint32(panels[0, panel, i // 2, column + i % 2]) << np.uint32(16)
            else:
                hidden[t, i] = panels[0, panel, i, column]


@njit(cache=True, nogil=True, fastmath=FASTMATH, inline="always")
def norm(row, weight, epsilon, out):  # pragma: no cover
    """RMSNorm (Zhang and Sennrich 2019) of one row."""
    total = np.float32(0.0)
    for i in range(len(row)):
        total += row[i] * row[i]
    scale = np.float32(1.0) / np.sqrt(total / np.float32(len(row)) + epsilon)
    for i in range(len(row)):
        out[i] = row[i] * scale * weight[i]


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def add_norm(hidden, delta, weight, epsilon, out):  # pragma: no cover
    """hidden [T, H] += delta (if any), and out = RMSNorm(hidden)."""
    for t in prange(len(hidden)):
        row = hidden[t]
        for i in range(len(row) if len(delta) else 0):
            row[i] += delta[t, i]
        line = np.empty(len(row), np.float32)
        norm(row, weight, epsilon, line)
        store(out, t, 0, line)
