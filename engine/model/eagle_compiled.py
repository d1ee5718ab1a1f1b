"""The EAGLE head's step on a CPU as one compiled function, from the parts of the compiled decoder."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import njit

from tailserve.engine.model.decoder import Shape, strips_of
from tailserve.engine.model.decoder_weights import Array, aligned, float_panels, integer_panels, interleave
from tailserve.engine.model.eagle import EagleConfig, EagleHead
from tailserve.engine.model.int8 import Panels, Quantized, project, project_gated
from tailserve.engine.model.kernels import norm_all
from tailserve.engine.model.memory import untouched_zeros
from tailserve.engine.model.paged_kernels import attend, split_heads
from tailserve.engine.model.panels import panel_shapes
from tailserve.engine.model.spans import Span, pack, query_tiles
from tailserve.engine.model.tiles import COLUMNS, MAX_ROWS, PAGE

_KERNELS = 32
"""Counters that a step's kernels share their work by."""


class _Weights(NamedTuple):
    token_norm: Array
    state_norm: Array
    qkv: Panels
    output: Panels
    post_norm: Array
    gate_up: Panels
    down: Panels
    final_norm: Array
    head: Panels
    cosines: Array
    sines: Array
    nothing: Array
    """[1, 0]: biases and norms that a decoder may have."""


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
            if int8:
                return integer_panels([weight.float()])
            return Panels(float_panels([weight.to(dtype)], pair), np.empty((1, 0), np.float32))

        angles = torch.arange(max_model_len).unsqueeze(1) * head.frequencies.cpu()
        gate, up = head.gate_up.weight.chunk(2)
        self._weights = _Weights(
            token_norm=head.token_norm.weight.float().numpy(),
            state_norm=head.state_norm.weight.float().numpy(),
            qkv=panels(head.qkv.weight),
            output=panels(head.output.weight),
            post_norm=head.post_norm.weight.float().numpy(),
            gate_up=panels(interleave(gate, up)),
            down=panels(head.down.weight),
            final_norm=head.final_norm.weight.float().numpy(),
            head=panels(lm_head),
            cosines=torch.cat([angles.cos()] * 2, -1).numpy(),
            sines=torch.cat([angles.sin()] * 2, -1).numpy(),
            nothing=np.empty((1, 0), np.float32),
        )
        self._kind = np.dtype(np.uint16 if pair == 2 else np.float32)
        keys, values = panel_shapes(1, num_blocks, kv_heads, block_size, head_dim, pair)
        self._keys, self._values = untouched_zeros(keys, self._kind), untouched_zeros(values, self._kind)
        self._counters = np.zeros(_KERNELS, np.int64)
        self._vocab = len(lm_head)
        self._widest = max(2 * config.hidden_size, config.intermediate_size, heads * head_dim)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """See `HeadModel.fuse`."""
        return self._head.states(features).float()

    def step(self, spans: Sequence[Span], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `HeadModel.step`."""
        numba.set_num_threads(self._num_threads)
        batch = pack(spans, self.block_size)
        tokens = len(batch.token_ids)
        embeddings = torch.nn.functional.embedding(torch.from_numpy(batch.token_ids), self._embedding).float()
        narrow = Quantized(
            aligned((((tokens | 1) * self._widest) if self._weights.qkv.scales.size else 1,), np.int8),
            np.empty(tokens, np.float32),
            np.empty(tokens, np.int64),
        )
        out, logits = _run(
            self._weights,
            self._shape,
            self._window,
            self._num_threads,
            narrow,
            np.empty(0, self._kind),
            self._counters,
            self._keys,
            self._values,
            embeddings.numpy(),
            states.numpy(),
            batch.positions,
            batch.slots,
            query_tiles(batch.query_starts, batch.starts, self._tile_width),
            batch.block_tables,
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
def _memory(like, tokens, columns):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Strips [columns / 32, tokens, 32] of the type of the array `like`."""
    return strips_of(np.empty((tokens | 1) * columns, like.dtype), columns, tokens)


@njit(cache=True, nogil=True)
def _run(  # type: ignore[no-untyped-def]  # pragma: no cover
    weights,
    shape,
    window,
    threads,
    narrow,
    kind,
    counters,
    keys,
    values,
    embeddings,
    states,
    positions,
    slots,
    tiles,
    tables,
    wanted,
):
    """float32 states [R, C] and logits [R, 32 P] at the indices `wanted`, from embeddings and states [T, C]."""
    tokens, size = states.shape
    groups = shape.heads // shape.kv_heads
    epsilon, scaling = np.float32(shape.epsilon), np.float32(shape.scaling)
    hidden, embedded = _memory(states, tokens, size), _memory(states, tokens, size)
    for t in range(tokens):
        for i in range(size):
            hidden[i // COLUMNS, t, i % COLUMNS] = states[t, i]
            embedded[i // COLUMNS, t, i % COLUMNS] = embeddings[t, i]
    joined = _memory(kind, tokens, 2 * size)
    normed = _memory(kind, tokens, size)
    qkv = _memory(states, tokens, weights.qkv.data.shape[1] * COLUMNS)
    attended = _memory(kind, tokens, shape.heads * shape.head_dim)
    inner = _memory(kind, tokens, weights.gate_up.data.shape[1] // 2 * COLUMNS)
    query = np.empty((shape.kv_heads, tokens, groups, shape.head_dim), kind.dtype)
    strip, row = hidden.strides[0], hidden.strides[1]
    half = size // COLUMNS
    counters[:] = 0
    turn = counters.ctypes.data
    norm_all(embedded, weights.token_norm, epsilon, joined[:half], (threads, turn))
    norm_all(hidden, weights.state_norm, epsilon, joined[half:], (threads, turn + 8))
    project(joined, narrow, weights.qkv, 0, qkv.ctypes.data, strip, row, 0, threads, turn + 16)
    split_heads(
        0,
        qkv,
        weights.nothing,
        weights.nothing,
        weights.nothing,
        epsilon,
        weights.cosines,
        weights.sines,
        positions,
        slots,
        query,
        keys,
        values,
        (threads, turn + 32),
    )
    attend(0, query, keys, values, tiles, tables, scaling, window, attended, (threads, turn + 40))
    project(attended, narrow, weights.output, 0, hidden.ctypes.data, strip, row, 1, threads, turn + 48)
    norm_all(hidden, weights.post_norm, epsilon, normed, (threads, turn + 64))
    project_gated(normed, narrow, weights.gate_up, 0, inner, threads, turn + 72)
    project(inner, narrow, weights.down, 0, hidden.ctypes.data, strip, row, 1, threads, turn + 88)
    count = len(wanted)
    out = np.empty((count, size), np.float32)
    logits = np.empty((count, weights.head.data.shape[1] * COLUMNS), np.float32)
    if count == 0:
        return out, logits
    last, final = _memory(states, count, size), _memory(kind, count, size)
    for n in range(count):
        last[:, n] = hidden[:, wanted[n]]
        for i in range(size):
            out[n, i] = hidden[i // COLUMNS, wanted[n], i % COLUMNS]
    norm_all(last, weights.final_norm, epsilon, final, (threads, turn + 104))
    project(final, narrow, weights.head, 0, logits.ctypes.data, last.strides[1], logits.strides[0], 0, threads, turn + 112)
    return out, logits
