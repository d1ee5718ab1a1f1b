"""A whole decoder step on a CPU as one compiled function, for models built like Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit
from transformers import PreTrainedModel

from tailserve.engine.model.decoder_weights import Array, aligned, fits, read_weights, sliding_window
from tailserve.engine.model.kernels import add_norm, embed, gated, linear
from tailserve.engine.model.paged_kernels import attend, split_heads
from tailserve.engine.model.spans import Span, pack
from tailserve.engine.model.tiles import COLUMNS, MAX_ROWS, PAGE

DTYPES = (torch.bfloat16, torch.float32)


class Shape(NamedTuple):
    """What the arrays do not say."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    epsilon: float


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
        self, model: PreTrainedModel, *, num_blocks: int, block_size: int, max_model_len: int, num_threads: int
    ) -> None:
        attention: Any = model.model.layers[0].self_attn
        self.num_blocks, self.block_size = num_blocks, block_size
        self._num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self._vocab = model.lm_head.out_features
        self._weights = read_weights(model, max_model_len)
        self._shape = Shape(
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            epsilon=model.model.norm.variance_epsilon,
        )
        self.sliding_window = sliding_window(attention)
        layers, kv_heads, head_dim = len(self._weights.qkv), self._shape.kv_heads, self._shape.head_dim
        kind = self._weights.qkv.dtype
        pair = 4 // kind.itemsize
        shape = (layers, num_blocks, kv_heads, block_size // PAGE)
        self._keys = aligned((*shape, head_dim // pair, PAGE * pair), kind)
        self._values = aligned((*shape, head_dim // COLUMNS, PAGE // pair, COLUMNS * pair), kind)

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`."""
        # A limit of the calling thread, which may be another one than that which loaded the model.
        numba.set_num_threads(self._num_threads)
        batch = pack(spans, self.block_size)
        logits = _run(
            self._weights,
            self._shape,
            self.sliding_window or 0,
            self._keys,
            self._values,
            batch.token_ids,
            batch.positions,
            batch.slots,
            self._tiles(batch.query_starts, batch.starts),
            batch.block_tables,
            batch.wanted,
        )
        return torch.from_numpy(logits)[:, : self._vocab]

    def _tiles(self, query_starts: Array, starts: Array) -> Array:
        """Query tokens in tiles that fill the rows of a product: [N, 4] as `attend` takes them."""
        width = max(1, MAX_ROWS // (self._shape.heads // self._shape.kv_heads))
        lengths = np.diff(query_starts)
        counts = -(-lengths // width)
        owner = np.repeat(np.arange(len(lengths)), counts)
        offsets = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * width
        sizes = np.minimum(width, lengths[owner] - offsets)
        return np.stack([owner, query_starts[owner] + offsets, sizes, starts[owner] + offsets], axis=1).astype(np.int64)


@njit(cache=True, nogil=True)
def _run(  # type: ignore[no-untyped-def]  # pragma: no cover
    weights, shape, window, keys, values, token_ids, positions, slots, tiles, tables, wanted
):
    """float32 logits [len(wanted), 32 P] of the tokens at the indices `wanted`. Stores keys and values on the way."""
    tokens, size, kind = len(token_ids), weights.input_norm.shape[1], weights.qkv.dtype
    epsilon, scaling = np.float32(shape.epsilon), np.float32(shape.scaling)
    hidden = np.empty((tokens, size), np.float32)
    normed = np.empty((tokens, size), kind)
    qkv = np.empty((tokens, weights.qkv.shape[1] * COLUMNS), np.float32)
    query = np.empty((shape.kv_heads, tokens, shape.heads // shape.kv_heads, shape.head_dim), kind)
    attended = np.empty((tokens, shape.heads * shape.head_dim), kind)
    inner = np.empty((tokens, weights.gate_up.shape[1] // 2 * COLUMNS), kind)
    nothing, delta = np.empty((0, 0), np.float32), np.empty((tokens, weights.output.shape[1] * COLUMNS), np.float32)
    embed(token_ids, weights.embedding, hidden)
    for layer in range(len(weights.qkv)):
        add_norm(hidden, delta if layer else nothing, weights.input_norm[layer], epsilon, normed)
        linear(normed, weights.qkv, layer, qkv)
        split_heads(
            layer,
            qkv,
            weights.qkv_bias,
            weights.query_norm,
            weights.key_norm,
            epsilon,
            weights.cosines,
            weights.sines,
            positions,
            slots,
            query,
            keys,
            values,
        )
        attend(layer, query, keys, values, tiles, tables, scaling, window, attended)
        linear(attended, weights.output, layer, delta)
        add_norm(hidden, delta, weights.post_norm[layer], epsilon, normed)
        gated(normed, weights.gate_up, layer, inner)
        linear(inner, weights.down, layer, delta)
    add_norm(hidden, delta, weights.final_norm, epsilon, normed)
    logits = np.empty((len(wanted), weights.head.shape[1] * COLUMNS), np.float32)
    linear(normed[wanted], weights.head, 0, logits)
    return logits
