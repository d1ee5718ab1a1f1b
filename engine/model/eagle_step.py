"""What the compiled EAGLE head runs in a step, in each of its threads; see `tailserve.engine.model.decoder_step`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit, prange

from tailserve.engine.model.int8 import project
from tailserve.engine.model.kernels import copy_in, copy_out, norm_all, pick_rows
from tailserve.engine.model.layer import HEAD_KERNELS, KERNELS, LayerWeights, finish_layer, make_heads, strips_of
from tailserve.engine.model.team import later, team_of
from tailserve.engine.model.tiles import COLUMNS


@njit(parallel=True, cache=True, nogil=True)
def run(  # pragma: no cover
    norms, mix, qkv, output, gate_up, down, vectors, head, shape, window, scratch, narrow, joined, embedded, cache,
    embeddings, states, places, tiles, wanted, out, logits, threads, lines, ticks,
):  # fmt: skip
    """float32 states `out` [R, C] and logits [R, 32 P] at the indices `wanted`, from embeddings and states [T, C]."""
    lines[:] = 0
    for member in prange(threads):
        team = team_of(member, threads, len(states), lines.ctypes.data)
        layer = LayerWeights(qkv, output, gate_up, down, vectors)
        _step(
            norms, mix, layer, head, shape, window, scratch, narrow, joined, embedded, cache, embeddings, states, places,
            tiles, wanted, out, logits, team, ticks[member],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _step(  # pragma: no cover
    norms, mix, layer, head, shape, window, scratch, narrow, joined_memory, embedded_memory, cache, embeddings, states,
    places, tiles, wanted, out, logits, team, ticks,
):  # fmt: skip
    """One thread's part in a step."""
    tokens, size = states.shape
    epsilon, half = np.float32(shape.epsilon), size // COLUMNS
    hidden, embedded = strips_of(scratch.hidden, size, tokens), strips_of(embedded_memory, size, tokens)
    joined = strips_of(joined_memory, 2 * size, tokens)
    copy_in(states, hidden, team)
    copy_in(embeddings, embedded, later(team, 1))
    norm_all(embedded, norms.token, epsilon, joined[:half], later(team, 2))
    norm_all(hidden, norms.state, epsilon, joined[half:], later(team, 3))
    strip, row = hidden.strides[0], hidden.strides[1]
    project(joined, narrow, mix, 0, hidden.ctypes.data, strip, row, 1, later(team, 4))
    query, now = make_heads(
        0, joined, scratch, narrow, layer, shape, places, cache, later(team, 6), ticks, 0
    )  # fmt: skip
    team = later(team, 6 + HEAD_KERNELS)
    # Of the other tokens, only keys and values are needed.
    count = len(wanted)
    if count == 0:
        return
    team = team_of(team[0], team[1], count, team[3])
    last, final = strips_of(scratch.qkv, size, count), strips_of(scratch.normed, size, count)
    pick_rows(hidden, wanted, last, team)
    finish_layer(
        0, query, last, tiles, scratch, narrow, layer, shape, window, places, cache, later(team, 1), ticks, now
    )  # fmt: skip
    team = later(team, 1 + KERNELS)
    copy_out(last, out, 0, team)
    norm_all(last, norms.final, epsilon, final, later(team, 1))
    row = logits.shape[1] * 4
    project(final, narrow, head, 0, logits.ctypes.data, last.strides[1], row, 0, later(team, 2))
