"""How the compiled decoder lays out keys and values; see `tailserve.engine.model.paged_kernels`."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from tailserve.engine.model.attention import KVCache, as_array
from tailserve.engine.model.tiles import COLUMNS, PAGE

Array = npt.NDArray[Any]


def panel_shapes(
    layers: int, num_blocks: int, kv_heads: int, block_size: int, head_dim: int, pair: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the keys and of the values, `pair` numbers to 4 bytes."""
    shape = (layers, num_blocks, kv_heads, block_size // PAGE)
    return (*shape, head_dim // pair, PAGE * pair), (*shape, head_dim // COLUMNS, PAGE // pair, COLUMNS * pair)


def copy_blocks(cache: KVCache, blocks: Array, keys: Array, values: Array) -> None:
    """Copies some blocks of a cache of the same type into panels."""
    for layer in range(len(keys)):
        _, _, pages, depth, width = keys.shape[1:]
        pair = width // PAGE
        head_dim = depth * pair
        some_keys, some_values = (
            as_array(side[layer][torch.from_numpy(blocks)]).reshape(len(blocks), -1, pages, PAGE, head_dim)
            for side in (cache.keys, cache.values)
        )
        shape = some_keys.shape[:3]
        lanes = some_keys.reshape(*shape, PAGE, depth, pair).swapaxes(3, 4)
        keys[layer, blocks] = lanes.reshape(*shape, depth, width)
        parts = some_values.reshape(*shape, PAGE // pair, pair, head_dim // COLUMNS, COLUMNS).transpose(0, 1, 2, 5, 3, 6, 4)
        values[layer, blocks] = parts.reshape(*shape, head_dim // COLUMNS, PAGE // pair, COLUMNS * pair)
