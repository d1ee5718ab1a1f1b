"""Paged attention of the compiled decoder: heads are split into pages, and attended to where they lie.

Pages are laid out as panels of the matrix products that read them. A page of keys is 16 columns of one product with the
queries; a page of values is 16 rows of one with the weights. `pair` is 2 for bfloat16, 1 for float32:

    keys   [layers, blocks, kv_heads, pages, head_dim / pair, 16 * pair]
    values [layers, blocks, kv_heads, pages, head_dim / 32, 16 / pair, 32 * pair]
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from tailserve.engine.model.kernels import norm, put
from tailserve.engine.model.microkernel import LANES
from tailserve.engine.model.team import meet, take, take_next
from tailserve.engine.model.tiles import COLUMNS, PAGE, score, weigh
from tailserve.engine.model.vectors import exp, hold, larger, peak, read, spread, total, write

NOWHERE = np.float32(-1e30)
"""A score whose weight is 0."""


@njit(cache=True, nogil=True)
def _rotate(like, head, head_dim, cosines, sines, rotary, out):  # pragma: no cover
    """Rotary embedding (Su et al. 2021) of the first `rotary` dimensions, halves against each other. Addresses."""
    half, size = rotary // 2, like.itemsize
    for i in range(0, half, LANES):
        a, b = read(head + i * 4), read(head + (half + i) * 4)
        put(like, out + i * size, a * read(cosines + i * 4) - b * read(sines + i * 4))
        cosine, sine = read(cosines + (half + i) * 4), read(sines + (half + i) * 4)
        put(like, out + (half + i) * size, b * cosine + a * sine)
    for i in range(rotary, head_dim, LANES):
        put(like, out + i * size, read(head + i * 4))


@njit(cache=True, nogil=True)
def split_heads(  # pragma: no cover
    layer, qkv, bias, q_norm, k_norm, epsilon, cosines, sines, positions, slots, query, keys, values, team
):
    """Rotated queries into query [kv_heads, T, groups, head_dim], rotated keys and the values into their pages.

    qkv [N / 32, T, 32], float32, is queries, keys and values side by side; slots [T] as block * block_size + offset.
    """
    kv_heads, tokens, groups, head_dim = query.shape
    pages, pair, strips, rotary = keys.shape[3], keys.shape[5] // PAGE, head_dim // COLUMNS, cosines.shape[1]
    x, strip_stride, target, size = qkv.ctypes.data, qkv.strides[0], query.ctypes.data, query.itemsize
    cosine_base, sine_base, angles = cosines.ctypes.data, sines.ctypes.data, cosines.strides[0]
    q_scale, k_scale = q_norm[layer:].ctypes.data, k_norm[layer:].ctypes.data
    # Pages as units of 4 bytes for keys, and of one number for values.
    key_units = keys.reshape(-1).view(np.uint32)
    value_units = values.reshape(-1)
    head, stored = np.empty(head_dim, np.float32), np.empty(head_dim, keys.dtype)
    units, address, narrow = stored.view(np.uint32), head.ctypes.data, stored.ctypes.data
    t = take(team, tokens)
    while t < tokens:
        block, page, lane = slots[t] // (pages * PAGE), slots[t] // PAGE % pages, slots[t] % PAGE
        cosine, sine = cosine_base + positions[t] * angles, sine_base + positions[t] * angles
        for h in range(kv_heads * (groups + 2)):
            for i in range(0, head_dim, LANES):
                value = read(x + (h * strips + i // COLUMNS) * strip_stride + t * 128 + i % COLUMNS * 4)
                write(address + i * 4, value)
            if bias.shape[1]:
                for i in range(head_dim):
                    head[i] += bias[layer, h * head_dim + i]
            if h < kv_heads * groups:
                if q_norm.shape[1]:
                    norm(head, address, 128, q_scale, strips, epsilon, address, 128)
                place = target + ((h // groups * tokens + t) * groups + h % groups) * head_dim * size
                _rotate(query, address, head_dim, cosine, sine, rotary, place)
                continue
            number = h - kv_heads * groups
            own = ((layer * keys.shape[1] + block) * kv_heads + number % kv_heads) * pages + page
            if number < kv_heads:
                if k_norm.shape[1]:
                    norm(head, address, 128, k_scale, strips, epsilon, address, 128)
                _rotate(stored, address, head_dim, cosine, sine, rotary, narrow)
                place = own * (head_dim // pair) * PAGE + lane
                for step in range(len(units)):
                    key_units[place + step * PAGE] = units[step]
                continue
            for i in range(0, head_dim, LANES):
                put(stored, narrow + i * size, read(address + i * 4))
            for strip in range(strips):
                place = ((own * strips + strip) * (PAGE // pair) + lane // pair) * COLUMNS * pair + lane % pair
                for d in range(COLUMNS):
                    value_units[place + d * pair] = stored[strip * COLUMNS + d]
        t = take_next(team, tokens, t)
    hold(head)
    hold(stored)
    meet(team, tokens)


@njit(cache=True, nogil=True)
def attend(layer, query, keys, values, tiles_and_rows, tables, scaling, window, out, team):  # pragma: no cover
    """Causal attention of query [kv_heads, T, groups, head_dim] over the pages of its sequences.

    With tiles [N, 4] as of `spans.query_tiles` come the rows [N] of out [heads * head_dim / 32, R, 32] that each begins at.
    The rows of its products are its tokens times the groups, so keys are read once for all of them. window 0 is none.
    """
    kv_heads, _, groups, head_dim = query.shape
    block_pages, pair, strips = keys.shape[3], keys.shape[5] // PAGE, head_dim // COLUMNS
    key_base, value_base = keys.ctypes.data + layer * keys.strides[0], values.ctypes.data + layer * values.strides[0]
    block_stride, head_stride, page_stride = keys.strides[1], keys.strides[2], keys.strides[3]
    query_base, query_stride, row_stride = query.ctypes.data, query.strides[1], query.strides[2]
    target, size, strip = out.ctypes.data, out.itemsize, out.strides[0]
    tiles, places = tiles_and_rows
    tasks = len(tiles) * kv_heads
    task = take(team, tasks)
    while task < tasks:
        n, h = task // kv_heads, task % kv_heads
        sequence, begin, position = tiles[n, 0], tiles[n, 1], tiles[n, 3]
        rows = tiles[n, 2] * groups
        first = max(0, position - window + 1) // PAGE if window > 0 else 0
        count = (position + tiles[n, 2] - 1) // PAGE + 1 - first
        # Keys, then values.
        pages = np.empty(2 * count, np.int64)
        for p in range(count):
            block, page = tables[sequence, (first + p) // block_pages], (first + p) % block_pages
            offset = block * block_stride + h * head_stride + page * page_stride
            pages[p], pages[count + p] = key_base + offset, value_base + offset
        width = count * PAGE
        scores = np.empty((rows, width), np.float32)
        weights = np.empty((rows, width), query.dtype)
        sums = np.zeros((rows, head_dim), np.float32)
        totals = np.empty(rows, np.float32)
        line, share, sum_base = scores.ctypes.data, weights.ctypes.data, sums.ctypes.data
        x = query_base + h * query.strides[0] + begin * query_stride
        score(query, rows, x, row_stride, pages, count, head_dim // pair, line, width * 4)
        for r in range(rows):
            own = position + r // groups
            low = max(0, own - window + 1 - first * PAGE) if window > 0 else 0
            for j in range(low):
                scores[r, j] = NOWHERE
            for j in range(own + 1 - first * PAGE, width):
                scores[r, j] = NOWHERE
            totals[r] = _softmax(weights, line + r * width * 4, width, scaling, share + r * width * size)
        weigh(query, rows, share, width * size, pages, count, strips, sum_base, head_dim * 4)
        for r in range(rows):
            # Dividing the sums is cheaper than dividing the weights.
            inverse = spread(np.float32(1.0) / totals[r])
            place = target + (h * groups + r % groups) * strips * strip + (places[n] + r // groups) * COLUMNS * size
            for d in range(0, head_dim, LANES):
                value = read(sum_base + (r * head_dim + d) * 4) * inverse
                put(out, place + d // COLUMNS * strip + d % COLUMNS * size, value)
        hold(scores)
        hold(weights)
        hold(sums)
        task = take_next(team, tasks, task)
    meet(team, tasks)


@njit(cache=True, nogil=True)
def _softmax(like, scores, width, scaling, weights):  # pragma: no cover
    """weights = e**(scaling * (scores - their peak)), from address to address. Returns the sum."""
    lead = read(scores)
    for j in range(LANES, width, LANES):
        lead = larger(lead, read(scores + j * 4))
    lead, scale, size = spread(peak(lead)), spread(scaling), like.itemsize
    sums = spread(np.float32(0.0))
    for j in range(0, width, LANES):
        weight = exp((read(scores + j * 4) - lead) * scale)
        sums = sums + weight
        put(like, weights + j * size, weight)
    return total(sums)
