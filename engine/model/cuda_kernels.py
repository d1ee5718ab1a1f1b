"""Paged attention for CUDA in Triton: queries in tiles, keys in splits, so that a few long sequences fill a GPU too.

Split keys and their combination follow Flash-Decoding (Dao et al. 2023), the running softmax Milakov and Gimelshein (2018).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["num_tokens"])
def attend_tiles(
    query, keys, values, tables, tiles, sums, peaks, totals, sinks, out,
    scaling, window, softcap, num_tokens,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, ALONE: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one KV head over one part of its context: program (tile, head, part).

    query and out [T, heads, head_dim]; keys and values [blocks, kv_heads, block_size, head_dim]; tiles [N, 4] of where in
    tables the sequence's begins, first token, tokens (0: nothing to do), position of the first token; sinks [heads]. With
    one part (ALONE) rows of out; else unscaled sums [parts, T, heads, head_dim], and the peak and the total of each row's
    softmax [parts, T, heads], all float32. window 0 and softcap 0 are none.
    """
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = tables + tl.load(tiles + tile * 4)
    first = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    if count == 0:
        return
    # Rows are tokens times the heads that share this KV head.
    rows = tl.arange(0, ROWS)
    own = position + rows // GROUPS
    alive = rows < count * GROUPS
    columns = tl.arange(0, WIDTH)
    wide = columns < HEAD_DIM
    lines = (first + rows // GROUPS) * (KV_HEADS * GROUPS) + head * GROUPS + rows % GROUPS
    x = tl.load(query + lines[:, None] * HEAD_DIM + columns[None, :], mask=alive[:, None] & wide[None, :], other=0.0)
    low = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0) // KEYS * KEYS
    end = position + count
    share = tl.cdiv(tl.cdiv(end - low, KEYS), tl.num_programs(2)) * KEYS
    begin = low + part * share
    stop = tl.minimum(begin + share, end)
    peak = tl.full([ROWS], NOWHERE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, WIDTH], tl.float32)
    for here in range(begin, stop, KEYS):
        places = here + tl.arange(0, KEYS)
        there = places < stop
        block = tl.load(table + places // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        slot = ((block * KV_HEADS + head) * BLOCK_SIZE + places % BLOCK_SIZE) * HEAD_DIM
        inside = there[:, None] & wide[None, :]
        k = tl.load(keys + slot[:, None] + columns[None, :], mask=inside, other=0.0)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee") * scaling
        if softcap > 0:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        seen = there[None, :] & (places[None, :] <= own[:, None])
        if window > 0:
            seen &= places[None, :] > own[:, None] - window
        scores = tl.where(seen, scores, NOWHERE)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        decay = tl.exp(peak - higher)
        v = tl.load(values + slot[:, None] + columns[None, :], mask=inside, other=0.0)
        weighted = weighted * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        peak = higher
    if ALONE:
        if HAS_SINKS:
            sink = tl.load(sinks + head * GROUPS + rows % GROUPS).to(tl.float32)
            higher = tl.maximum(peak, sink)
            decay = tl.exp(peak - higher)
            total = total * decay + tl.exp(sink - higher)
            weighted = weighted * decay[:, None]
        # Rows that are no query's may see nothing.
        result = (weighted / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + lines[:, None] * HEAD_DIM + columns[None, :], result, mask=alive[:, None] & wide[None, :])
    else:
        lines += part * num_tokens * KV_HEADS * GROUPS
        tl.store(sums + lines[:, None] * HEAD_DIM + columns[None, :], weighted, mask=alive[:, None] & wide[None, :])
        tl.store(peaks + lines, peak, mask=alive)
        tl.store(totals + lines, total, mask=alive)


@triton.jit(do_not_specialize=["num_rows", "parts"])
def combine_parts(
    sums, peaks, totals, sinks, out, num_rows, parts, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """out [T, heads, head_dim] from the parts, at most PARTS. A program for each of T * heads rows."""
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    wide = columns < HEAD_DIM
    part = tl.arange(0, PARTS)
    places = part * num_rows + row
    shares = tl.load(totals + places, mask=part < parts, other=0.0)
    own = tl.load(peaks + places, mask=shares > 0, other=NOWHERE)
    peak = tl.max(own, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + row % HEADS).to(tl.float32)
        peak = tl.maximum(peak, sink)
    factors = tl.exp(own - peak)
    total = tl.sum(shares * factors, 0)
    if HAS_SINKS:
        total += tl.exp(sink - peak)
    x = tl.load(sums + places[:, None] * HEAD_DIM + columns[None, :], mask=(shares > 0)[:, None] & wide[None, :], other=0.0)
    weighted = tl.sum(x * factors[:, None], 0)
    # Rows that fill a graph up are nobody's: their totals are what memory held.
    total = tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + columns, (weighted / total).to(out.dtype.element_ty), mask=wide)
