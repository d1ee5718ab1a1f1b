"""Paged attention for CUDA in Triton: queries in tiles, keys in splits, so that a few long sequences fill a GPU too.

Split keys and their combination follow Flash-Decoding (Dao et al. 2023), the running softmax Milakov and Gimelshein (2018).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(-1e30)


@triton.jit
def attend_tiles(
    query, keys, values, tables, tiles, sums, peaks, totals,
    scaling, window, softcap, table_stride, num_tokens,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one KV head over one of SPLITS parts of its context.

    query [T, heads, head_dim]; keys and values [blocks, kv_heads, block_size, head_dim]; tiles [N, 4] of sequence, first
    token, tokens (0: nothing to do), position of the first token. Unscaled sums [SPLITS, T, heads, head_dim], and the peak
    and the total of each row's softmax [SPLITS, T, heads], all float32. window 0 and softcap 0 are none.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + tile * 4)
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
    share = tl.cdiv(tl.cdiv(end - low, KEYS), SPLITS) * KEYS
    begin = low + split * share
    stop = tl.minimum(begin + share, end)
    peak = tl.full([ROWS], NOWHERE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, WIDTH], tl.float32)
    for here in range(begin, stop, KEYS):
        places = here + tl.arange(0, KEYS)
        there = places < stop
        block = tl.load(tables + sequence * table_stride + places // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
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
    lines += split * num_tokens * KV_HEADS * GROUPS
    tl.store(sums + lines[:, None] * HEAD_DIM + columns[None, :], weighted, mask=alive[:, None] & wide[None, :])
    tl.store(peaks + lines, peak, mask=alive)
    tl.store(totals + lines, total, mask=alive)


@triton.jit
def combine_splits(
    sums, peaks, totals, sinks, out, num_rows, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """out [T, heads, head_dim] from the parts; rows of no tile (totals 0) become 0. A program for each of T * heads rows."""
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    wide = columns < HEAD_DIM
    peak = NOWHERE
    for split in range(SPLITS):
        place = split * num_rows + row
        peak = tl.maximum(peak, tl.load(peaks + place, mask=tl.load(totals + place) > 0, other=NOWHERE))
    total = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + row % HEADS).to(tl.float32)
        peak = tl.maximum(peak, sink)
        total = tl.exp(sink - peak)
    weighted = tl.zeros([WIDTH], tl.float32)
    for split in range(SPLITS):
        place = split * num_rows + row
        share = tl.load(totals + place)
        factor = tl.exp(tl.load(peaks + place, mask=share > 0, other=NOWHERE) - peak)
        total += share * factor
        weighted += (
            tl.load(sums + place * HEAD_DIM + columns, mask=columns < tl.where(share > 0, HEAD_DIM, 0), other=0.0) * factor
        )
    total = tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + columns, (weighted / total).to(out.dtype.element_ty), mask=wide)
