"""A whole decoder step on a CPU as one compiled function, for models built like Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from transformers import PreTrainedModel

from tailserve.engine.model.attention import KVCache
from tailserve.engine.model.cpus import cpu_sets
from tailserve.engine.model.decoder_step import Asked, pick, run
from tailserve.engine.model.decoder_weights import fits, read_weights
from tailserve.engine.model.layer import (
    HEAD_KERNELS,
    KERNELS,
    PARTS,
    Array,
    Cache,
    Places,
    Shape,
    allocate_scratch,
)
from tailserve.engine.model.memory import Reserve, aligned, untouched_zeros
from tailserve.engine.model.panels import copy_blocks, panel_shapes
from tailserve.engine.model.spans import Span, pack, query_tiles, wanted_tiles
from tailserve.engine.model.structure import sliding_window
from tailserve.engine.model.team import LINE
from tailserve.engine.model.tiles import COLUMNS, MAX_ROWS, PAGE

DTYPES = (torch.bfloat16, torch.float32)


def can_compile(model: PreTrainedModel, block_size: int) -> bool:
    """Whether `CompiledDecoder` takes this model."""
    return model.device.type == "cpu" and model.dtype in DTYPES and block_size % PAGE == 0 and fits(model)


class CompiledDecoder:
    """A `PagedModel` without a Python call between the embedding and the logits.

    Results do not depend on what else is in the batch, in bfloat16 neither: they are the same bits alone and among others,
    in one chunk and in several. Copies the weights: the transformers model may go.
    """

    backend = "compiled"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_blocks: int,
        num_spare_blocks: int = 0,
        block_size: int,
        max_model_len: int,
        num_threads: int,
        int8: bool = False,
    ) -> None:
        """`num_spare_blocks`: the last of them, which are used out of turn."""
        attention: Any = model.model.layers[0].self_attn
        self.num_blocks, self.block_size = num_blocks, block_size
        self._num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self._cpus = cpu_sets(self._num_threads)
        self._vocab = model.lm_head.out_features
        self._weights = read_weights(model, max_model_len, int8=int8)
        self._shape = Shape(
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            epsilon=model.model.norm.variance_epsilon,
        )
        self.sliding_window = sliding_window(attention)
        # Query tokens that fill the rows of a product.
        self._tile_width = max(1, MAX_ROWS // (self._shape.heads // self._shape.kv_heads))
        layers, kv_heads, head_dim = len(self._weights.ends.input_norm), self._shape.kv_heads, self._shape.head_dim
        kind = self._weights.ends.embedding.dtype
        self.tap(())
        self.features: torch.Tensor | None = None
        self._kind = kind
        self._scratch, self._narrow = allocate_scratch(self._weights.layers, self._shape, MAX_ROWS, kind)
        # Each thread writes to memory of its own.
        self._ticks = aligned((self._num_threads, 2 * LINE // 8), np.int64)
        self.ticks: Array = self._ticks[0, : len(PARTS)]
        """The CPU's ticks that each of PARTS has taken one thread since the start, waiting for others included."""
        keys, values = panel_shapes(layers, num_blocks, kv_heads, block_size, head_dim, 4 // kind.itemsize)
        self._keys, self._values = untouched_zeros(keys, kind), untouched_zeros(values, kind)
        self._reserve = Reserve([self._keys, self._values], num_spare_blocks)

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`."""
        # A limit of the calling thread, which may be another one than that which loaded the model.
        numba.set_num_threads(self._num_threads)
        batch = pack(spans, self.block_size)
        self._reserve.note_use(batch.block_tables)
        if len(batch.token_ids) > self._scratch.hidden.size // self._weights.ends.input_norm.shape[1]:
            self._scratch, self._narrow = allocate_scratch(
                self._weights.layers, self._shape, 2 * len(batch.token_ids), self._kind
            )
        tiles = query_tiles(batch.query_starts, batch.starts, self._tile_width)
        rows = tiles[:, 1].copy()
        # Behind the last layer's keys and values nobody reads the other tokens, but who taps that layer.
        if len(self._weights.ends.input_norm) - 1 in self._tapped:
            last, kept, wanted = (tiles, rows), np.arange(len(batch.token_ids)), batch.wanted
        else:
            last = wanted_tiles(batch, np.array([span.num_logits for span in spans]), self._tile_width)
            kept, wanted = batch.wanted, np.arange(len(batch.wanted))
        width = len(self._tapped) * self._weights.ends.input_norm.shape[1]
        features = np.empty((len(batch.token_ids) if width else 0, width), np.float32)
        logits = np.empty((len(batch.wanted), self._weights.head.data.shape[1] * COLUMNS), np.float32)
        run(
            self._weights.ends,
            *self._weights.layers,
            self._weights.head,
            self._shape,
            self.sliding_window or 0,
            self._scratch,
            self._narrow,
            Cache(self._keys, self._values),
            Places(batch.token_ids, batch.positions, batch.slots, batch.block_tables),
            (tiles, rows),
            last,
            Asked(kept, wanted, logits, self._tapped, features),
            self._num_threads,
            self._cpus,
            self._lines,
            self._ticks,
        )
        self.features = torch.from_numpy(features) if width else None
        return torch.from_numpy(logits)[:, : self._vocab]

    def tap(self, layers: Sequence[int]) -> None:
        """See `PagedModel.tap`."""
        self._tapped = np.array(layers, np.int64)
        # For the kernels of a step: each layer's and its norm, the taps, the embedding, and those of the last tokens.
        kernels = (1 + HEAD_KERNELS + KERNELS) * len(self._weights.ends.input_norm) + len(layers) + 6
        self._lines = aligned((kernels * self._num_threads, LINE // 8), np.int64)

    def take_over(self, cache: KVCache, blocks: Array) -> None:
        """Copies the keys and values of some blocks from a cache of the same shape and type."""
        copy_blocks(cache, blocks, self._keys, self._values)

    def copy_block(self, source: int, target: int) -> None:
        """See `PagedModel.copy_block`."""
        for side in (self._keys, self._values):
            side[:, target] = side[:, source]

    def kv_parts(self) -> list[torch.Tensor]:
        """See `PagedModel.kv_parts`."""
        return [torch.from_numpy(part) for side in (self._keys, self._values) for part in side]

    def pick(self, logits: torch.Tensor, temperatures: Sequence[float], keys: Array) -> torch.Tensor:
        """See `PagedModel.pick`."""
        tokens = np.empty(len(logits), np.int64)
        inverse = np.array([1 / t if t > 0 else 0.0 for t in temperatures], np.float32)
        row, threads = logits.stride(0) * 4, self._num_threads
        pick(logits.data_ptr(), row, logits.shape[1], inverse, keys, tokens, self._lines, threads)
        return torch.from_numpy(tokens)
