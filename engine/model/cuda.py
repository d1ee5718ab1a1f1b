"""Attention on CUDA: reads paged blocks where they lie, for any mix of prompts, single tokens and draft positions."""

from __future__ import annotations

import torch
import triton

from tailserve.engine.model.attention import KVCache, Options, PackedSequences
from tailserve.engine.model.cuda_kernels import attend_tiles, combine_parts

ROWS = 16
"""Rows of a tile: what a matrix instruction takes at least."""
LONG = 512
"""Tokens of a batch above which it is mostly prompts."""
LONG_ROWS = 64
KEYS = 64
"""Keys that are read at a time."""
WIDEST = 256
"""Bytes of a key up to which so many fit a processor's own memory; of wider ones half as many, for half of the rows."""
MAX_PARTS = 16
PROGRAMS = 8
"""How many a processor should have to choose from: contexts are split until there are as many."""
WARPS, LONG_WARPS = 2, 4
STAGES = 2
"""Both were the fastest on an H200."""


def tile_width(heads: int, kv_heads: int, rows: int = ROWS) -> int:
    """Query tokens of a tile of so many rows."""
    return max(1, rows // (heads // kv_heads))


class CudaBackend:
    """`num_processors`: how many tiles the device works on at once."""

    name = "cuda"

    def __init__(self, num_processors: int) -> None:
        self._num_processors = num_processors

    def attend(
        self, query: torch.Tensor, cache: KVCache, layer: int, sequences: PackedSequences, options: Options
    ) -> torch.Tensor:
        query = query.contiguous()
        tokens, heads, head_dim = query.shape
        keys, values = cache.keys[layer], cache.values[layer]
        kv_heads, size = keys.shape[1], keys.shape[2]
        groups = heads // kv_heads
        share = 1 if head_dim * query.itemsize <= WIDEST else 2
        each = tile_width(heads, kv_heads, LONG_ROWS // share if tokens > LONG else ROWS)
        tiles, tables = sequences.tiles(each), sequences.tables()
        fitting = PROGRAMS * self._num_processors // (len(tiles) * kv_heads)
        parts = 1 if tokens > LONG else max(1, min(MAX_PARTS, fitting))
        out = torch.empty_like(query)
        sums, peaks, totals = out, out, out
        if parts > 1:
            sums = query.new_empty((parts, tokens, heads, head_dim), dtype=torch.float32)
            peaks, totals = query.new_empty((2, parts, tokens, heads), dtype=torch.float32)
        sinks, has_sinks = (out, False) if options.sinks is None else (options.sinks, True)
        width = max(16, triton.next_power_of_2(head_dim))
        attend_tiles[(len(tiles), kv_heads, parts)](
            query, keys, values, tables, tiles, sums, peaks, totals, sinks, out,
            options.scaling, options.sliding_window or 0, options.softcap or 0.0, tokens,
            KV_HEADS=kv_heads, GROUPS=groups, HEAD_DIM=head_dim, BLOCK_SIZE=size,
            ROWS=max(ROWS, triton.next_power_of_2(each * groups)), KEYS=KEYS // share, WIDTH=width, ALONE=parts == 1,
            HAS_SINKS=has_sinks, num_warps=LONG_WARPS if tokens > LONG else WARPS, num_stages=STAGES,
        )  # fmt: skip
        if parts > 1:
            combine_parts[(tokens * heads,)](
                sums, peaks, totals, sinks, out, tokens * heads, parts,
                HEADS=heads, HEAD_DIM=head_dim, PARTS=MAX_PARTS, WIDTH=width, HAS_SINKS=has_sinks, num_warps=1,
            )  # fmt: skip
        return out
