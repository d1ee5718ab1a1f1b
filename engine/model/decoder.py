"""A whole decoder step on a CPU as one compiled function, for models built like Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import njit
from transformers import PreTrainedModel

from tailserve.engine.model.attention import KVCache
from tailserve.engine.model.decoder_weights import fits, read_weights, sliding_window
from tailserve.engine.model.int8 import project
from tailserve.engine.model.kernels import embed, norm_all, pick_all
from tailserve.engine.model.layer import (
    COUNTERS,
    EMBED,
    HEAD,
    NORM,
    PARTS,
    Array,
    Places,
    Shape,
    allocate_scratch,
    lap,
    run_layer,
    strips_of,
)
from tailserve.engine.model.memory import Reserve, untouched_zeros
from tailserve.engine.model.panels import copy_blocks, panel_shapes
from tailserve.engine.model.spans import Span, pack, query_tiles
from tailserve.engine.model.team import cycles
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
        layers, kv_heads, head_dim = len(self._weights.input_norm), self._shape.kv_heads, self._shape.head_dim
        kind = self._weights.embedding.dtype
        self._tapped = np.empty(0, np.int64)
        self.features: torch.Tensor | None = None
        self._kind = kind
        self._scratch = allocate_scratch(self._weights.layers, self._shape, MAX_ROWS, kind)
        # One for each kernel of a step to share its work by: each layer's and its norm, and those behind them.
        self._counters = np.zeros((1 + COUNTERS) * (layers + 1), np.int64)
        self.ticks = np.zeros(len(PARTS), np.int64)
        """The CPU's ticks that each of PARTS has taken since the start."""
        keys, values = panel_shapes(layers, num_blocks, kv_heads, block_size, head_dim, 4 // kind.itemsize)
        self._keys, self._values = untouched_zeros(keys, kind), untouched_zeros(values, kind)
        self._reserve = Reserve([self._keys, self._values], num_spare_blocks)

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`."""
        # A limit of the calling thread, which may be another one than that which loaded the model.
        numba.set_num_threads(self._num_threads)
        batch = pack(spans, self.block_size)
        self._reserve.note_use(batch.block_tables)
        if len(batch.token_ids) > self._scratch.hidden.size // self._weights.input_norm.shape[1]:
            self._scratch = allocate_scratch(self._weights.layers, self._shape, 2 * len(batch.token_ids), self._kind)
        width = len(self._tapped) * self._weights.input_norm.shape[1]
        features = np.empty((len(batch.token_ids) if width else 0, width), np.float32)
        logits = _run(
            self._weights,
            self._shape,
            self.sliding_window or 0,
            self._num_threads,
            self._scratch,
            self._counters,
            self.ticks,
            self._keys,
            self._values,
            batch.token_ids,
            Places(
                batch.positions,
                batch.slots,
                query_tiles(batch.query_starts, batch.starts, self._tile_width),
                batch.block_tables,
            ),
            batch.wanted,
            self._tapped,
            features,
        )
        self.features = torch.from_numpy(features) if width else None
        return torch.from_numpy(logits)[:, : self._vocab]

    def tap(self, layers: Sequence[int]) -> None:
        """See `PagedModel.tap`."""
        self._tapped = np.array(layers, np.int64)

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
        self._counters[0] = 0
        team = (self._num_threads, self._counters.ctypes.data)
        pick_all(logits.data_ptr(), logits.stride(0) * 4, logits.shape[1], inverse, keys, tokens, team)
        return torch.from_numpy(tokens)


@njit(cache=True, nogil=True)
def _run(  # type: ignore[no-untyped-def]  # pragma: no cover
    weights,
    shape,
    window,
    threads,
    scratch,
    counters,
    ticks,
    keys,
    values,
    token_ids,
    places,
    wanted,
    tapped,
    features,
):
    """float32 logits [len(wanted), 32 P] of the tokens at the indices `wanted`. Stores keys and values on the way, and in
    `features` [tokens, hidden states of each layer `tapped`]."""
    tokens, size = len(token_ids), weights.input_norm.shape[1]
    epsilon = np.float32(shape.epsilon)
    hidden, normed = strips_of(scratch.hidden, size, tokens), strips_of(scratch.normed, size, tokens)
    counters[:] = 0
    turn = counters.ctypes.data
    now = cycles()  # type: ignore[call-arg, var-annotated]
    embed(token_ids, weights.embedding, hidden)
    now = lap(ticks, EMBED, now)
    for layer in range(len(weights.input_norm)):
        norm_all(hidden, weights.input_norm[layer], epsilon, normed, (threads, turn))
        now = lap(ticks, NORM, now)
        now = run_layer(
            layer,
            normed,
            hidden,
            scratch,
            weights.layers,
            shape,
            window,
            places,
            keys,
            values,
            threads,
            turn + 8,
            ticks,
            now,
        )
        turn += 8 * (1 + COUNTERS)
        for n in range(len(tapped)):
            if tapped[n] == layer:
                _copy_out(hidden, features, n)
    logits = np.empty((len(wanted), weights.head.data.shape[1] * COLUMNS), np.float32)
    if len(wanted) == 0:
        return logits
    last, normed = strips_of(scratch.qkv, size, len(wanted)), strips_of(scratch.normed, size, len(wanted))
    for n in range(len(wanted)):
        last[:, n] = hidden[:, wanted[n]]
    norm_all(last, weights.final_norm, epsilon, normed, (threads, turn))
    project(
        normed,
        scratch.narrow,
        weights.head,
        0,
        logits.ctypes.data,
        last.strides[1],
        logits.strides[0],
        0,
        threads,
        turn + 8,
    )
    lap(ticks, HEAD, now)
    return logits


@njit(cache=True, nogil=True)
def _copy_out(hidden, features, place):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Hidden states from strips to rows, as the part `place` of each."""
    begin = place * hidden.shape[0] * COLUMNS
    for token in range(hidden.shape[1]):
        for strip in range(hidden.shape[0]):
            for column in range(COLUMNS):
                features[token, begin + strip * COLUMNS + column] = hidden[strip, token, column]
