"""The EAGLE head's step on a CPU as one compiled function, from the parts of the compiled decoder."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import nn

from tailserve.engine.model.decoder_weights import interleave, make_panels
from tailserve.engine.model.eagle import EagleConfig, EagleHead, level
from tailserve.engine.model.eagle_step import run
from tailserve.engine.model.int8 import Panels
from tailserve.engine.model.layer import (
    HEAD_KERNELS,
    KERNELS,
    Array,
    Cache,
    LayerVectors,
    LayerWeights,
    Places,
    Shape,
    allocate_scratch,
)
from tailserve.engine.model.linear import prepack
from tailserve.engine.model.memory import aligned, untouched_zeros
from tailserve.engine.model.panels import panel_shapes
from tailserve.engine.model.spans import Span, pack, wanted_tiles
from tailserve.engine.model.team import LINE
from tailserve.engine.model.tiles import COLUMNS, MAX_ROWS, PAGE


class _Norms(NamedTuple):
    token: Array
    state: Array
    final: Array


class _Weights(NamedTuple):
    norms: _Norms
    mix: Panels
    layer: LayerWeights
    head: Panels


class CompiledHead:
    """`tailserve.engine.model.eagle_drafter.HeadModel` without a Python call in a step. For CPUs and block sizes in whole
    pages; int8 where the CPU has the instruction, since a draft need not be exact."""

    def __init__(
        self,
        head: EagleHead,
        embedding: torch.Tensor,
        lm_head: torch.Tensor,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        window: int,
        num_threads: int,
        int8: bool,
    ) -> None:
        """`embedding` [vocab, C] and `lm_head` [draft vocab, C] in bfloat16 or float32."""
        config = head.config
        dtype = embedding.dtype
        pair = 2 if dtype == torch.bfloat16 else 1
        self.num_blocks, self.block_size = num_blocks, block_size
        self._config, self._embedding, self._window, self._num_threads = config, embedding, window, num_threads
        self._fuse = nn.Sequential(head.fuse.to(dtype))
        prepack(self._fuse)
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._shape = Shape(heads, kv_heads, head_dim, head_dim**-0.5, config.rms_norm_eps)
        self._tile_width = max(1, MAX_ROWS // (heads // kv_heads))

        def panels(weight: torch.Tensor) -> Panels:
            return make_panels([weight.to(dtype)], pair, int8=int8)

        def vector(weight: torch.Tensor) -> Array:
            array: Array = weight.float().numpy()
            return array

        angles = torch.arange(max_model_len).unsqueeze(1) * head.frequencies.cpu()
        nothing = np.empty((1, 0), np.float32)
        self._weights = _Weights(
            norms=_Norms(*(vector(norm.weight) for norm in (head.token_norm, head.state_norm, head.final_norm))),
            mix=panels(head.mix.weight),
            layer=LayerWeights(
                qkv=panels(head.qkv.weight),
                output=panels(head.output.weight),
                gate_up=panels(interleave(*head.gate_up.weight.chunk(2))),
                down=panels(head.down.weight),
                vectors=LayerVectors(
                    qkv_bias=nothing,
                    query_norm=nothing,
                    key_norm=nothing,
                    post_norm=vector(head.post_norm.weight)[np.newaxis],
                    cosines=vector(torch.cat([angles.cos()] * 2, -1)),
                    sines=vector(torch.cat([angles.sin()] * 2, -1)),
                ),
            ),
            head=panels(lm_head),
        )
        self._kind = np.dtype(np.uint16 if pair == 2 else np.float32)
        keys, values = panel_shapes(1, num_blocks, kv_heads, block_size, head_dim, pair)
        self._keys, self._values = untouched_zeros(keys, self._kind), untouched_zeros(values, self._kind)
        self._vocab = len(lm_head)
        self._allocate(MAX_ROWS)
        # The layer's; two norms, a product and what they read before it; behind it what is read, a norm and a product.
        self._lines = aligned(((HEAD_KERNELS + KERNELS + 11) * num_threads, LINE // 8), np.int64)
        self._ticks = aligned((num_threads, 2 * LINE // 8), np.int64)

    def _allocate(self, tokens: int) -> None:
        self._room = tokens
        self._scratch, self._narrow = allocate_scratch(self._weights.layer, self._shape, tokens, self._kind)
        size = len(self._weights.norms.final)
        self._joined = aligned(((tokens | 1) * 2 * size,), self._kind)
        self._embedded = aligned(((tokens | 1) * size,), np.float32)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """See `HeadModel.fuse`."""
        fused: torch.Tensor = self._fuse(level(features, self._config).to(self._embedding.dtype))
        return fused.float()

    def copy_block(self, source: int, target: int) -> None:
        """See `HeadModel.copy_block`."""
        self._keys[:, target] = self._keys[:, source]
        self._values[:, target] = self._values[:, source]

    def step(self, spans: Sequence[Span], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `HeadModel.step`."""
        numba.set_num_threads(self._num_threads)
        batch = pack(spans, self.block_size)
        tokens = len(batch.token_ids)
        embeddings = torch.nn.functional.embedding(torch.from_numpy(batch.token_ids), self._embedding).float()
        if tokens > self._room:
            self._allocate(2 * tokens)
        out = np.empty((len(batch.wanted), len(self._weights.norms.final)), np.float32)
        logits = np.empty((len(batch.wanted), self._weights.head.data.shape[1] * COLUMNS), np.float32)
        run(
            self._weights.norms,
            self._weights.mix,
            *self._weights.layer,
            self._weights.head,
            self._shape,
            self._window,
            self._scratch,
            self._narrow,
            self._joined,
            self._embedded,
            Cache(self._keys, self._values),
            embeddings.numpy(),
            states.numpy(),
            Places(batch.token_ids, batch.positions, batch.slots, batch.block_tables),
            wanted_tiles(batch, np.array([span.num_logits for span in spans]), self._tile_width),
            batch.wanted,
            out,
            logits,
            self._num_threads,
            self._lines,
            self._ticks,
        )
        return torch.from_numpy(out), torch.from_numpy(logits)[:, : self._vocab]


def can_compile_head(head: EagleHead, dtype: torch.dtype, block_size: int) -> bool:
    """Whether `CompiledHead` takes a head, on a CPU."""
    config = head.config
    return (
        dtype in (torch.bfloat16, torch.float32)
        and block_size % PAGE == 0
        and config.head_dim % COLUMNS == 0
        and config.hidden_size % COLUMNS == 0
        and config.intermediate_size % COLUMNS == 0
    )


def compile_head(dtype: torch.dtype, *, int8: bool) -> None:
    """Fills the cache of compiled code, by way of a small random head."""
    config = EagleConfig(
        hidden_size=64, vocab_size=64, num_verifier_layers=1, feature_layers=(0,), intermediate_size=64,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, draft_vocab_size=32,
    )  # fmt: skip
    head = EagleHead(config).requires_grad_(False)
    weights = torch.zeros(64, 64, dtype=dtype)
    model = CompiledHead(
        head, weights, weights[:32], num_blocks=2, block_size=PAGE, max_model_len=32, window=32, num_threads=1, int8=int8
    )
    model.step([Span([1, 2], 0, [0, 1], 1)], torch.zeros(2, 64))
