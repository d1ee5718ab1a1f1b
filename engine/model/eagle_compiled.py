"""The EAGLE head's step on a CPU as one compiled function, from the parts of the compiled decoder."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import njit

from tailserve.engine.model.decoder_weights import interleave, make_panels
from tailserve.engine.model.eagle import EagleConfig, EagleHead
from tailserve.engine.model.int8 import Panels, project
from tailserve.engine.model.kernels import norm_all
from tailserve.engine.model.layer import (
    COUNTERS,
    PARTS,
    Array,
    LayerWeights,
    Places,
    Shape,
    allocate_scratch,
    run_layer,
    strips_of,
)
from tailserve.engine.model.memory import aligned, untouched_zeros
from tailserve.engine.model.panels import panel_shapes
from tailserve.engine.model.spans import Span, pack, query_tiles
from tailserve.engine.model.tiles import COLUMNS, MAX_ROWS, PAGE


class _Weights(NamedTuple):
    token_norm: Array
    state_norm: Array
    mix: Panels
    layer: LayerWeights
    final_norm: Array
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
        self._head, self._embedding, self._window, self._num_threads = head, embedding, window, num_threads
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
            token_norm=vector(head.token_norm.weight),
            state_norm=vector(head.state_norm.weight),
            mix=panels(head.mix.weight),
            layer=LayerWeights(
                qkv=panels(head.qkv.weight),
                qkv_bias=nothing,
                query_norm=nothing,
                key_norm=nothing,
                output=panels(head.output.weight),
                post_norm=vector(head.post_norm.weight)[np.newaxis],
                gate_up=panels(interleave(*head.gate_up.weight.chunk(2))),
                down=panels(head.down.weight),
                cosines=vector(torch.cat([angles.cos()] * 2, -1)),
                sines=vector(torch.cat([angles.sin()] * 2, -1)),
            ),
            final_norm=vector(head.final_norm.weight),
            head=panels(lm_head),
        )
        self._kind = np.dtype(np.uint16 if pair == 2 else np.float32)
        keys, values = panel_shapes(1, num_blocks, kv_heads, block_size, head_dim, pair)
        self._keys, self._values = untouched_zeros(keys, self._kind), untouched_zeros(values, self._kind)
        self._vocab = len(lm_head)
        self._allocate(MAX_ROWS)
        # The layer's, two norms and a product before it, a norm and a product behind.
        self._counters = np.zeros(COUNTERS + 8, np.int64)
        self._ticks = np.zeros(len(PARTS), np.int64)

    def _allocate(self, tokens: int) -> None:
        self._room = tokens
        self._scratch = allocate_scratch(self._weights.layer, self._shape, tokens, self._kind)
        size = len(self._weights.final_norm)
        self._joined = aligned(((tokens | 1) * 2 * size,), self._kind)
        self._embedded = aligned(((tokens | 1) * size,), np.float32)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """See `HeadModel.fuse`."""
        return self._head.states(features).float()

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
        out, logits = _run(
            self._weights,
            self._shape,
            self._window,
            self._num_threads,
            self._scratch,
            self._joined,
            self._embedded,
            self._counters,
            self._ticks,
            self._keys,
            self._values,
            embeddings.numpy(),
            states.numpy(),
            Places(
                batch.positions,
                batch.slots,
                query_tiles(batch.query_starts, batch.starts, self._tile_width),
                batch.block_tables,
            ),
            batch.wanted,
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


@njit(cache=True, nogil=True)
def _run(  # type: ignore[no-untyped-def]  # pragma: no cover
    weights,
    shape,
    window,
    threads,
    scratch,
    joined_memory,
    embedded_memory,
    counters,
    ticks,
    keys,
    values,
    embeddings,
    states,
    places,
    wanted,
):
    """float32 states [R, C] and logits [R, 32 P] at the indices `wanted`, from embeddings and states [T, C]."""
    tokens, size = states.shape
    epsilon, half = np.float32(shape.epsilon), size // COLUMNS
    hidden, embedded = strips_of(scratch.hidden, size, tokens), strips_of(embedded_memory, size, tokens)
    joined = strips_of(joined_memory, 2 * size, tokens)
    for t in range(tokens):
        for i in range(size):
            hidden[i // COLUMNS, t, i % COLUMNS] = states[t, i]
            embedded[i // COLUMNS, t, i % COLUMNS] = embeddings[t, i]
    counters[:] = 0
    turn = counters.ctypes.data
    norm_all(embedded, weights.token_norm, epsilon, joined[:half], (threads, turn))
    norm_all(hidden, weights.state_norm, epsilon, joined[half:], (threads, turn + 8))
    strip, row = hidden.strides[0], hidden.strides[1]
    project(joined, scratch.narrow, weights.mix, 0, hidden.ctypes.data, strip, row, 1, threads, turn + 16)
    turn += 32
    run_layer(
        0, joined, hidden, scratch, weights.layer, shape, window, places, keys, values, threads, turn, ticks, 0
    )  # fmt: skip
    turn += 8 * COUNTERS
    count = len(wanted)
    out = np.empty((count, size), np.float32)
    logits = np.empty((count, weights.head.data.shape[1] * COLUMNS), np.float32)
    last, final = strips_of(scratch.qkv, size, count), strips_of(scratch.normed, size, count)
    for n in range(count):
        last[:, n] = hidden[:, wanted[n]]
        for i in range(size):
            out[n, i] = hidden[i // COLUMNS, wanted[n], i % COLUMNS]
    norm_all(last, weights.final_norm, epsilon, final, (threads, turn))
    project(
        final, scratch.narrow, weights.head, 0, logits.ctypes.data, last.strides[1], logits.strides[0], 0, threads, turn + 8
    )  # fmt: skip
    return out, logits
