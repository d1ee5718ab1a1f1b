"""Paged attention as transformers sees it: one registered function that hands each layer to a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from tailserve.engine.model.memory import untouched_zeros
from tailserve.engine.model.spans import query_tiles

NAME = "tailserve_paged"
"""`attn_implementation` of models that run in packed batches. It has no mask function, so transformers makes no mask."""


@dataclass(frozen=True)
class Options:
    """What a layer asks of its attention beyond plain causal softmax. Backends honour all of it."""

    scaling: float
    sliding_window: int | None = None
    """A query sees itself and the `sliding_window - 1` positions before it."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: torch.Tensor | None = None
    """[heads]: a logit per head that takes part in the softmax and has no value."""


@dataclass(frozen=True)
class PackedSequences:
    """The geometry of one packed batch of S sequences and T tokens. Arrays live on the host."""

    query_starts: npt.NDArray[np.int32]
    """[S + 1]: sequence s has the tokens query_starts[s] : query_starts[s + 1] of the batch."""
    context_lens: npt.NDArray[np.int32]
    """[S]: tokens of each sequence up to and with its last in the batch."""
    block_tables: npt.NDArray[np.int32]
    """[S, M]: block ids in order, padded with 0."""
    slots: torch.Tensor
    """[T] integers, on the device: where each token's keys and values go, as block * block_size + offset."""
    _device: dict[str, torch.Tensor] = field(default_factory=dict)

    def place(self, tables: torch.Tensor, tiles: torch.Tensor) -> None:
        """What is on the device already. `tables` may be of any shape, and longer."""
        self._device.update(tables=tables, tiles=tiles)

    def tables(self) -> torch.Tensor:
        """`block_tables` on the device, int32; sent there once for all layers."""
        return self._once("tables", lambda: self.block_tables)

    def tiles(self, width: int) -> torch.Tensor:
        """`spans.query_tiles` on the device, int32, likewise; each with the place where its sequence's table begins."""

        def make() -> npt.NDArray[Any]:
            starts = self.context_lens - np.diff(self.query_starts)
            return query_tiles(self.query_starts, starts, width) * (self.block_tables.shape[1], 1, 1, 1)

        return self._once("tiles", make)

    def _once(self, name: str, make: Callable[[], npt.NDArray[Any]]) -> torch.Tensor:
        if name not in self._device:
            self._device[name] = torch.from_numpy(make().astype(np.int32)).to(self.slots.device, non_blocking=True)
        return self._device[name]


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A host tensor's own memory; numpy has no bfloat16, so its bits."""
    array: npt.NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class KVCache:
    """Keys and values of every layer in blocks: two tensors [num_blocks, kv_heads, block_size, head_dim] a layer.

    Blocks are heads-first so that a kernel that follows one head reads memory in a row.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, kv_heads, block_size, head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [T, kv_heads, head_dim] at `slots`."""
        slots = slots.long()
        blocks, offsets = slots // self.block_size, slots % self.block_size
        self.keys[layer].transpose(1, 2)[blocks, offsets] = keys
        self.values[layer].transpose(1, 2)[blocks, offsets] = values


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(untouched_zeros((size,), np.uint8)).view(dtype).view(shape)


class AttentionBackend(Protocol):
    name: str

    def attend(
        self, query: torch.Tensor, cache: KVCache, layer: int, sequences: PackedSequences, options: Options
    ) -> torch.Tensor:
        """Causal attention of query [T, heads, head_dim] over each token's own sequence; same shape and type back.

        Keys and values of the batch are in the cache already. Softmax is in float32.
        """


@dataclass(frozen=True)
class PagedContext:
    """Travels to every layer as the model's keyword argument `paged`."""

    cache: KVCache
    backend: AttentionBackend
    sequences: PackedSequences


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim].

    Returns [1, T, heads, head_dim] and no weights.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    paged.cache.write(layer, paged.sequences.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    options = Options(scaling, sliding_window, softcap, s_aux)
    out = paged.backend.attend(query[0].transpose(0, 1), paged.cache, layer, paged.sequences, options)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, paged_attention)
