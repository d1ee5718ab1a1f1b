"""One layer of a decoder on a CPU, from its first product to its last, and what it works on."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from tailserve.engine.model.int8 import Panels, Quantized, project, project_gated
from tailserve.engine.model.kernels import norm_all
from tailserve.engine.model.memory import aligned
from tailserve.engine.model.paged_kernels import attend, split_heads
from tailserve.engine.model.team import cycles
from tailserve.engine.model.tiles import COLUMNS

Array = npt.NDArray[Any]

PARTS = ("embedding", "norms", "qkv", "split heads", "attention", "output", "gate and up", "down", "head")
"""What `ticks` tell apart."""
EMBED, NORM, QKV, SPLIT, ATTEND, OUTPUT, GATE, DOWN, HEAD = range(len(PARTS))

COUNTERS = 11
"""Of 8 bytes each, that a layer's kernels share their work by."""


class Shape(NamedTuple):
    """What the arrays do not say."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    epsilon: float


class LayerWeights(NamedTuple):
    """Of all layers: panels, and float32 vectors."""

    qkv: Panels
    qkv_bias: Array
    """[layers, N], or [layers, 0] without."""
    query_norm: Array
    """[layers, head_dim], or [layers, 0] without."""
    key_norm: Array
    output: Panels
    post_norm: Array
    """[layers, H]"""
    gate_up: Panels
    """A panel of gate, then the same columns of up, and so on."""
    down: Panels
    cosines: Array
    """[positions, rotary dimensions]"""
    sines: Array


class Scratch(NamedTuple):
    """Memory for what a step computes on its way; fresh memory at every step would cost a page fault every 4 KB."""

    hidden: Array
    normed: Array
    qkv: Array
    query: Array
    attended: Array
    inner: Array
    narrow: Quantized


class Places(NamedTuple):
    """Where a batch's tokens are; see `spans.PackedSpans` and `spans.query_tiles`."""

    positions: Array
    slots: Array
    tiles: Array
    tables: Array


def allocate_scratch(weights: LayerWeights, shape: Shape, tokens: int, kind: npt.DTypeLike) -> Scratch:
    """For so many tokens, with activations of type `kind`."""
    tokens |= 1
    size, inner = weights.post_norm.shape[1], weights.gate_up.data.shape[1] // 2 * COLUMNS
    attended = shape.heads * shape.head_dim
    # Behind the last layer it holds hidden states.
    columns = max(weights.qkv.data.shape[1] * COLUMNS, size)
    widest = max(inner, attended, weights.qkv.data.shape[2] * (weights.qkv.data.shape[3] // COLUMNS))
    return Scratch(
        hidden=aligned((tokens * size,), np.float32),
        normed=aligned((tokens * size,), kind),
        qkv=aligned((tokens * columns,), np.float32),
        query=aligned((tokens * attended,), kind),
        attended=aligned((tokens * attended,), kind),
        inner=aligned((tokens * inner,), kind),
        narrow=Quantized(
            aligned((tokens * widest if weights.qkv.scales.size else 1,), np.int8),
            np.empty(tokens, np.float32),
            np.empty(tokens, np.int64),
        ),
    )


@njit(cache=True, nogil=True)
def run_layer(  # pragma: no cover
    layer, x, hidden, scratch, weights, shape, window, places, keys, values, threads, turn, ticks, since
):
    """Adds to hidden [H / 32, T, 32] what a layer makes of x [K / 32, T, 32], normed already. Stores keys and values.

    `turn`: address of `COUNTERS` zeros. Counts ticks by `PARTS` since `since`; returns the time now.
    """
    tokens, groups = hidden.shape[1], shape.heads // shape.kv_heads
    epsilon, scaling = np.float32(shape.epsilon), np.float32(shape.scaling)
    qkv = strips_of(scratch.qkv, weights.qkv.data.shape[1] * COLUMNS, tokens)
    attended = strips_of(scratch.attended, shape.heads * shape.head_dim, tokens)
    normed = strips_of(scratch.normed, hidden.shape[0] * COLUMNS, tokens)
    inner = strips_of(scratch.inner, weights.gate_up.data.shape[1] // 2 * COLUMNS, tokens)
    query = scratch.query[: tokens * shape.heads * shape.head_dim]
    query = query.reshape((shape.kv_heads, tokens, groups, shape.head_dim))
    narrow, target, strip, row = scratch.narrow, hidden.ctypes.data, hidden.strides[0], hidden.strides[1]
    project(x, narrow, weights.qkv, layer, qkv.ctypes.data, strip, row, 0, threads, turn)
    now = lap(ticks, QKV, since)
    split_heads(
        layer, qkv, weights.qkv_bias, weights.query_norm, weights.key_norm, epsilon, weights.cosines, weights.sines,
        places.positions, places.slots, query, keys, values, (threads, turn + 16),
    )  # fmt: skip
    now = lap(ticks, SPLIT, now)
    attend(
        layer, query, keys, values, places.tiles, places.tables, scaling, window, attended, (threads, turn + 24)
    )  # fmt: skip
    now = lap(ticks, ATTEND, now)
    project(attended, narrow, weights.output, layer, target, strip, row, 1, threads, turn + 32)
    now = lap(ticks, OUTPUT, now)
    norm_all(hidden, weights.post_norm[layer], epsilon, normed, (threads, turn + 48))
    now = lap(ticks, NORM, now)
    project_gated(normed, narrow, weights.gate_up, layer, inner, threads, turn + 56)
    now = lap(ticks, GATE, now)
    project(inner, narrow, weights.down, layer, target, strip, row, 1, threads, turn + 72)
    return lap(ticks, DOWN, now)


@njit(cache=True, nogil=True)
def lap(ticks, part, since):  # pragma: no cover
    """Counts the time since `since` as a part's; the time now."""
    now = cycles()
    ticks[part] += now - since
    return now


@njit(cache=True, nogil=True)
def strips_of(memory, columns, tokens):  # pragma: no cover
    """[columns / 32, tokens, 32] in a piece of memory. Strips begin an odd number of rows apart: caches put what is a power
    of two apart in the same few places."""
    rows = tokens | 1
    return memory[: rows * columns].reshape((columns // COLUMNS, rows, COLUMNS))[:, :tokens]
