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
from tailserve.engine.model.team import cycles, later
from tailserve.engine.model.tiles import COLUMNS

Array = npt.NDArray[Any]

PARTS = ("embedding", "norms", "qkv", "split heads", "attention", "output", "gate and up", "down", "head")
"""What `ticks` tell apart."""
EMBED, NORM, QKV, SPLIT, ATTEND, OUTPUT, GATE, DOWN, HEAD = range(len(PARTS))

HEAD_KERNELS, KERNELS = 3, 8
"""Of `make_heads` and of `finish_layer`, as they count for a team."""


class Shape(NamedTuple):
    """What the arrays do not say."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    epsilon: float


class LayerVectors(NamedTuple):
    """Of all layers, float32."""

    qkv_bias: Array
    """[layers, N], or [layers, 0] without."""
    query_norm: Array
    """[layers, head_dim], or [layers, 0] without."""
    key_norm: Array
    post_norm: Array
    """[layers, H]"""
    cosines: Array
    """[positions, rotary dimensions]"""
    sines: Array


class LayerWeights(NamedTuple):
    """Of all layers."""

    qkv: Panels
    output: Panels
    gate_up: Panels
    """A panel of gate, then the same columns of up, and so on."""
    down: Panels
    vectors: LayerVectors


class Scratch(NamedTuple):
    """Memory for what a step computes on its way; fresh memory at every step would cost a page fault every 4 KB."""

    hidden: Array
    normed: Array
    qkv: Array
    query: Array
    attended: Array
    inner: Array


class Cache(NamedTuple):
    """Keys and values; see `paged_kernels`."""

    keys: Array
    values: Array


class Places(NamedTuple):
    """A batch's tokens, and where they are; see `spans.PackedSpans`."""

    token_ids: Array
    positions: Array
    slots: Array
    tables: Array


def allocate_scratch(weights: LayerWeights, shape: Shape, tokens: int, kind: npt.DTypeLike) -> tuple[Scratch, Quantized]:
    """For so many tokens, with activations of type `kind`."""
    tokens |= 1
    size, inner = weights.vectors.post_norm.shape[1], weights.gate_up.data.shape[1] // 2 * COLUMNS
    attended = shape.heads * shape.head_dim
    # In the last layer, once heads are split, it holds hidden states.
    columns = max(weights.qkv.data.shape[1] * COLUMNS, size)
    widest = max(inner, attended, weights.qkv.data.shape[2] * (weights.qkv.data.shape[3] // COLUMNS))
    scratch = Scratch(
        hidden=aligned((tokens * size,), np.float32),
        normed=aligned((tokens * size,), kind),
        qkv=aligned((tokens * columns,), np.float32),
        query=aligned((tokens * attended,), kind),
        attended=aligned((tokens * attended,), kind),
        inner=aligned((tokens * inner,), kind),
    )
    values = aligned((tokens * widest if weights.qkv.scales.size else 1,), np.int8)
    return scratch, Quantized(values, np.empty(tokens, np.float32), np.empty(tokens, np.int64))


@njit(cache=True, nogil=True)
def make_heads(layer, x, scratch, narrow, weights, shape, places, cache, team, ticks, since):  # pragma: no cover
    """Stores a layer's keys and values of x [K / 32, T, 32], normed already.

    Returns its queries [kv_heads, T, groups, head_dim], and the time now; counts ticks by `PARTS` since `since`.
    """
    tokens, groups, vectors = x.shape[1], shape.heads // shape.kv_heads, weights.vectors
    qkv = strips_of(scratch.qkv, weights.qkv.data.shape[1] * COLUMNS, tokens)
    query = scratch.query[: tokens * shape.heads * shape.head_dim]
    query = query.reshape((shape.kv_heads, tokens, groups, shape.head_dim))
    project(x, narrow, weights.qkv, layer, qkv.ctypes.data, qkv.strides[0], qkv.strides[1], 0, team)
    now = lap(ticks, QKV, since)
    split_heads(
        layer, qkv, vectors.qkv_bias, vectors.query_norm, vectors.key_norm, np.float32(shape.epsilon), vectors.cosines,
        vectors.sines, places.positions, places.slots, query, cache.keys, cache.values, later(team, 2),
    )  # fmt: skip
    return query, lap(ticks, SPLIT, now)


@njit(cache=True, nogil=True)
def finish_layer(  # pragma: no cover
    layer, query, hidden, tiles, scratch, narrow, weights, shape, window, places, cache, team, ticks, since
):
    """Adds to hidden [H / 32, N, 32] what a layer makes of its queries.

    `tiles` are those of the queries wanted, and where in hidden each begins, as `attend` takes them. Counts ticks likewise;
    returns the time now.
    """
    tokens, vectors = hidden.shape[1], weights.vectors
    attended = strips_of(scratch.attended, shape.heads * shape.head_dim, tokens)
    normed = strips_of(scratch.normed, hidden.shape[0] * COLUMNS, tokens)
    inner = strips_of(scratch.inner, weights.gate_up.data.shape[1] // 2 * COLUMNS, tokens)
    target, strip, row = hidden.ctypes.data, hidden.strides[0], hidden.strides[1]
    attend(
        layer, query, cache.keys, cache.values, tiles, places.tables, np.float32(shape.scaling), window, attended, team
    )  # fmt: skip
    now = lap(ticks, ATTEND, since)
    project(attended, narrow, weights.output, layer, target, strip, row, 1, later(team, 1))
    now = lap(ticks, OUTPUT, now)
    norm_all(hidden, vectors.post_norm[layer], np.float32(shape.epsilon), normed, later(team, 3))
    now = lap(ticks, NORM, now)
    project_gated(normed, narrow, weights.gate_up, layer, inner, later(team, 4))
    now = lap(ticks, GATE, now)
    project(inner, narrow, weights.down, layer, target, strip, row, 1, later(team, 6))
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
