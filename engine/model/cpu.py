"""Attention on CPUs: decode and draft positions by a kernel that reads paged blocks in place, prompt chunks by tiles."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from tailserve.engine.model.attention import KVCache, Options, PackedSequences, as_array
from tailserve.engine.model.reference import attend_one

KERNEL_QUERIES = 16
"""Sequences with at most this many query tokens go through the kernel; more pay for matrix products over tiles."""

# Without NaN assumptions: masked scores are -inf. LLVM may reorder sums, which is what lets it vectorise them.
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}


@numba.njit(fastmath=_FASTMATH, cache=True, inline="always")
def _load(tile, source, count, is_bfloat16):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Converts the first `count` rows of a block [size, head_dim] to float32. bfloat16 comes as its bits."""
    if is_bfloat16:
        bits = tile.view(np.uint32)
        for j in range(count):
            for d in range(source.shape[1]):
                bits[j, d] = np.uint32(source[j, d]) << np.uint32(16)
    else:
        for j in range(count):
            for d in range(source.shape[1]):
                tile[j, d] = source[j, d]


@numba.njit(parallel=True, fastmath=_FASTMATH, cache=True, nogil=True)
def _kernel(  # type: ignore[no-untyped-def]  # pragma: no cover
    out, query, keys, values, chosen, query_starts, context_lens, tables, scaling, window, softcap, sinks, is_bfloat16
):
    """float32 out and query [T, heads, head_dim]; one task for each of the `chosen` sequences and each KV head."""
    kv_heads, size, head_dim = keys.shape[1], keys.shape[2], keys.shape[3]
    groups = query.shape[1] // kv_heads
    for task in numba.prange(len(chosen) * kv_heads):
        s = chosen[task // kv_heads]
        h = task % kv_heads
        begin, context = query_starts[s], context_lens[s]
        length = query_starts[s + 1] - begin
        rows = length * groups
        first = max(0, context - length - window + 1) // size if window > 0 else 0
        last = (context + size - 1) // size
        scores = np.empty((rows, (last - first) * size), np.float32)
        tile = np.empty((size, head_dim), np.float32)
        for b in range(first, last):
            count = min(size, context - b * size)
            _load(tile, keys[tables[s, b], h], count, is_bfloat16)
            for r in range(rows):
                q = query[begin + r // groups, h * groups + r % groups]
                position = context - length + r // groups
                for j in range(count):
                    dot = np.float32(0.0)
                    for d in range(head_dim):
                        dot += q[d] * tile[j, d]
                    dot *= scaling
                    if softcap > 0:
                        dot = softcap * np.float32(math.tanh(dot / softcap))
                    key = b * size + j
                    if key > position or (window > 0 and key <= position - window):
                        dot = np.float32(-np.inf)
                    scores[r, (b - first) * size + j] = dot
        width = context - first * size
        acc = np.zeros((rows, head_dim), np.float32)
        totals = np.empty(rows, np.float32)
        for r in range(rows):
            line = scores[r]
            head = h * groups + r % groups
            peak = sinks[head] if len(sinks) else line[0]
            for j in range(width):
                peak = max(peak, line[j])
            total = np.float32(0.0)
            for j in range(width):
                line[j] = np.exp(line[j] - peak)
                total += line[j]
            if len(sinks):
                total += np.exp(sinks[head] - peak)
            totals[r] = total
        for b in range(first, last):
            count = min(size, context - b * size)
            _load(tile, values[tables[s, b], h], count, is_bfloat16)
            for r in range(rows):
                for j in range(count):
                    weight = scores[r, (b - first) * size + j]
                    for d in range(head_dim):
                        acc[r, d] += weight * tile[j, d]
        for r in range(rows):
            for d in range(head_dim):
                out[begin + r // groups, h * groups + r % groups, d] = acc[r, d] / totals[r]


class CpuBackend:
    """`num_threads` bounds the kernel's threads; torch has a limit of its own."""

    name = "cpu"
    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, num_threads: int | None = None) -> None:
        limit: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        self._num_threads = min(num_threads or limit, limit)

    def attend(
        self, query: torch.Tensor, cache: KVCache, layer: int, sequences: PackedSequences, options: Options
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=torch.float32)
        keys, values = cache.keys[layer], cache.values[layer]
        lengths = np.diff(sequences.query_starts)
        short = np.flatnonzero(lengths <= KERNEL_QUERIES)
        if len(short):
            sinks = np.empty(0, np.float32) if options.sinks is None else options.sinks.float().numpy()
            numba.set_num_threads(self._num_threads)
            _kernel(
                out.numpy(),
                query.float().contiguous().numpy(),
                as_array(keys),
                as_array(values),
                short,
                sequences.query_starts,
                sequences.context_lens,
                sequences.block_tables,
                np.float32(options.scaling),
                options.sliding_window or 0,
                np.float32(options.softcap or 0.0),
                sinks,
                keys.dtype == torch.bfloat16,
            )
        for index in np.flatnonzero(lengths > KERNEL_QUERIES).tolist():
            span = slice(int(sequences.query_starts[index]), int(sequences.query_starts[index + 1]))
            table = torch.from_numpy(sequences.block_tables[index])
            out[span] = attend_one(query[span], keys, values, table, int(sequences.context_lens[index]), options)
        return out.to(query.dtype)
