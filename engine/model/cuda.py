"""Attention on CUDA: reads paged blocks where they lie, for any mix of prompts, single tokens and draft positions."""

from __future__ import annotations

import torch
import triton

from tailserve.engine.model.attention import KVCache, Options, PackedSequences
from tailserve.engine.model.cuda_kernels import attend_tiles, combine_splits

ROWS = 16
"""Rows of a tile: what a matrix instruction takes at least."""
KEYS = 64
"""Keys that are read at a time."""
MAX_SPLITS = 16


def tile_width(heads: int, kv_heads: int) -> int:
    """Query tokens of a tile."""
    return max(1, ROWS // (heads // kv_heads))


class CudaBackend:
    """`num_processors`: how many tiles the device works on at once; contexts are split until there are twice as many."""

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
        tiles = sequences.tiles(tile_width(heads, kv_heads))
        splits = max(1, min(MAX_SPLITS, 2 * self._num_processors // (len(tiles) * kv_heads)))
        parts = query.new_empty((splits, tokens, heads, head_dim), dtype=torch.float32)
        peaks, totals = (query.new_zeros((splits, tokens, heads), dtype=torch.float32) for _ in range(2))
        width = triton.next_power_of_2(head_dim)
        tables = sequences.tables()
        attend_tiles[(len(tiles), kv_heads, splits)](
            query, keys, values, tables, tiles, parts, peaks, totals,
            options.scaling, options.sliding_window or 0, options.softcap or 0.0, tables.stride(0), tokens,
            KV_HEADS=kv_heads, GROUPS=groups, HEAD_DIM=head_dim, BLOCK_SIZE=size, SPLITS=splits,
            ROWS=max(ROWS, triton.next_power_of_2(groups)), KEYS=KEYS, WIDTH=max(16, width),
        )  # fmt: skip
        out = torch.empty_like(query)
        combine_splits[(tokens * heads,)](
            parts, peaks, totals, query if options.sinks is None else options.sinks, out, tokens * heads,
            HEADS=heads, HEAD_DIM=head_dim, SPLITS=splits, WIDTH=max(16, width), HAS_SINKS=options.sinks is not None,
        )  # fmt: skip
        return out
