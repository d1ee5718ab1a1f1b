"""Paged attention of the compiled decoder: heads are split into pages, and attended to where they lie.

Pages are laid out as panels of the matrix products that read them. A page of keys is 16 columns of one product with the
queries; a page of values is 16 rows of one with the weights. `pair` is 2 for bfloat16, 1 for float32:

    keys   [layers, blocks, kv_heads, pages, head_dim / pair, 16 * pair]
    values [layers, blocks, kv_heads, pages, head_dim / 32, 16 / pair, 32 * pair]
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit, prange

from tailserve.engine.model.kernels import FASTMATH, exp, norm, store
from tailserve.engine.model.tiles import COLUMNS, PAGE, score, weigh


@njit(cache=True, nogil=True, fastmath=FASTMATH, inline="always")
def _rotate(head, cosines, sines, position, out):  # pragma: no cover
    """Rotary embedding (Su et al. 2021) of the first dimensions, halves against each other."""
    half = cosines.shape[1] // 2
    for i in range(half):
        out[i] = head[i] * cosines[position, i] - head[half + i] * sines[position, i]
    for i in range(half):
        out[half + i] = head[half + i] * cosines[position, half + i] + head[i] * sines[position, half + i]
    for i in range(2 * half, len(head)):
        out[i] = head[i]


@njit(parallel=True, cache=True, nogil=True)
def split_heads(  # pragma: no cover
    layer, qkv, bias, q_norm, k_norm, epsilon, cosines, sines, positions, slots, query, keys, values
):
    """Rotated queries into query [kv_heads, T, groups, head_dim], rotated keys and the values into their pages.

    qkv [T, N], float32, is queries, keys and values side by side; slots [T] as block * block_size + offset.
    """
    kv_heads, tokens, groups, head_dim = query.shape
    queries = query.reshape(kv_heads * tokens * groups, head_dim)
    pages, pair = keys.shape[3], keys.shape[5] // PAGE
    for t in prange(tokens):
        row = qkv[t]
        for i in range(bias.shape[1]):
            row[i] += bias[layer, i]
        block, page, lane = slots[t] // (pages * PAGE), slots[t] // PAGE % pages, slots[t] % PAGE
        head, line = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        stored = np.empty((1, head_dim), keys.dtype)
        for h in range(kv_heads * groups):
            for i in range(head_dim):
                head[i] = row[h * head_dim + i]
            if q_norm.shape[1]:
                norm(head, q_norm[layer], epsilon, head)
            _rotate(head, cosines, sines, positions[t], line)
            store(queries, (h // groups * tokens + t) * groups + h % groups, 0, line)
        for h in range(kv_heads):
            begin = (kv_heads * groups + h) * head_dim
            for i in range(head_dim):
                head[i] = row[begin + i]
            if k_norm.shape[1]:
                norm(head, k_norm[layer], epsilon, head)
            _rotate(head, cosines, sines, positions[t], line)
            store(stored, 0, 0, line)
            for d in range(head_dim):
                keys[layer, block, h, page, d // pair, lane * pair + d % pair] = stored[0, d]
            begin += kv_heads * head_dim
            for i in range(head_dim):
                line[i] = row[begin + i]
            store(stored, 0, 0, line)
            for d in range(head_dim):
                values[layer, block, h, page, d // COLUMNS, lane // pair, d % COLUMNS * pair + lane % pair] = stored[0, d]


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def attend(layer, query, keys, values, tiles, tables, scaling, window, out):  # pragma: no cover
    """Causal attention of query [kv_heads, T, groups, head_dim] over the pages of its sequences; out [T, heads * head_dim].

    tiles [N, 4]: sequence, first token of the batch, tokens, position of the first token. A tile's rows are its tokens times
    the groups, so keys are read once for all of them. window 0 is none.
    """
    kv_heads, groups, head_dim = query.shape[0], query.shape[2], query.shape[3]
    block_pages, pair = keys.shape[3], keys.shape[5] // PAGE
    key_base, value_base = keys.ctypes.data + layer * keys.strides[0], values.ctypes.data + layer * values.strides[0]
    block_stride, head_stride, page_stride = keys.strides[1], keys.strides[2], keys.strides[3]
    query_base, query_stride, row_stride = query.ctypes.data, query.strides[1], query.strides[2]
    for task in prange(len(tiles) * kv_heads):
        n, h = task // kv_heads, task % kv_heads
        sequence, begin, tokens, position = tiles[n, 0], tiles[n, 1], tiles[n, 2], tiles[n, 3]
        rows = tokens * groups
        first = max(0, position - window + 1) // PAGE if window > 0 else 0
        pages = np.empty((position + tokens - 1) // PAGE + 1 - first, np.int64)
        for p in range(len(pages)):
            block, page = tables[sequence, (first + p) // block_pages], (first + p) % block_pages
            pages[p] = key_base + block * block_stride + h * head_stride + page * page_stride
        scores = np.empty((rows, len(pages) * PAGE), np.float32)
        weights = np.zeros((rows, len(pages) * PAGE), query.dtype)
        sums = np.zeros((rows, head_dim), np.float32)
        x = query_base + h * query.strides[0] + begin * query_stride
        score(query, rows, x, row_stride, pages, head_dim // pair, scores.ctypes.data, scores.strides[0])
        for r in range(rows):
            own = position + r // groups
            low = max(0, own - window + 1 - first * PAGE) if window > 0 else 0
            line = scores[r, low : own + 1 - first * PAGE]
            peak = line[0]
            for j in range(len(line)):
                peak = max(peak, line[j])
            total = np.float32(0.0)
            for j in range(len(line)):
                line[j] = exp((line[j] - peak) * scaling)
                total += line[j]
            store(weights, r, low, line)
            # Dividing the sums is cheaper than dividing the weights; this waits in the row's first score.
            scores[r, 0] = total
        for p in range(len(pages)):
            pages[p] += value_base - key_base
        weigh(
            query, rows, weights.ctypes.data, weights.strides[0], pages, values.shape[4], sums.ctypes.data, sums.strides[0]
        )
        for r in range(rows):
            inverse = np.float32(1.0) / scores[r, 0]
            line = sums[r]
            for d in range(head_dim):
                line[d] *= inverse
            store(out, begin + r // groups, (h * groups + r % groups) * head_dim, line)
