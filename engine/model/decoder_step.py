"""What the compiled decoder runs in a step, in each of its threads.

Numba hands its threads tuples, but not tuples of tuples: those are taken apart before, and put together again.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from tailserve.engine.model.cpus import note_cpus, stay_on
from tailserve.engine.model.int8 import project
from tailserve.engine.model.kernels import copy_out, embed, norm_all, pick_all, pick_rows
from tailserve.engine.model.layer import (
    EMBED,
    HEAD,
    HEAD_KERNELS,
    KERNELS,
    NORM,
    Array,
    LayerWeights,
    finish_layer,
    lap,
    make_heads,
    strips_of,
)
from tailserve.engine.model.team import cycles, later, team_of


class Asked(NamedTuple):
    """What is wanted of a batch, and where it goes."""

    kept: Array
    """Tokens that the last layer is computed for."""
    wanted: Array
    """Indices of those of them whose logits are wanted."""
    logits: Array
    """float32 [wanted, 32 P]"""
    tapped: Array
    """Layers whose hidden states are wanted."""
    features: Array
    """float32 [T, those of each]"""


@njit(parallel=True, cache=True, nogil=True)
def run(  # pragma: no cover
    ends, qkv, output, gate_up, down, vectors, head, shape, window, scratch, narrow, cache, places, tiles, last_tiles, asked,
    threads, cpus, lines, ticks,
):  # fmt: skip
    """Stores keys and values of a batch, and what is `asked`.

    Tiles of all tokens and of those `kept` are as `paged_kernels.attend` takes them. Threads stay on their `cpus` (see
    `cpus.cpu_sets`).
    """
    lines[:] = 0
    if len(cpus) > 0:
        note_cpus(cpus[threads:].ctypes.data)
    for member in prange(threads):
        if len(cpus) > 0:
            stay_on(cpus[member:].ctypes.data)
        team = team_of(member, threads, len(places.token_ids), lines.ctypes.data)
        layers = LayerWeights(qkv, output, gate_up, down, vectors)
        _step(
            ends, layers, head, shape, window, scratch, narrow, cache, places, tiles, last_tiles, asked, team, ticks[member]
        )
    # Threads and processes that this one starts would stay where it does.
    if len(cpus) > 0:
        stay_on(cpus[threads:].ctypes.data)


@njit(cache=True, nogil=True)
def _step(  # pragma: no cover
    ends, layers, head, shape, window, scratch, narrow, cache, places, tiles, last_tiles, asked, team, ticks
):  # fmt: skip
    """One thread's part in a step."""
    tokens, size, count = len(places.token_ids), ends.input_norm.shape[1], len(ends.input_norm)
    epsilon, kept, wanted, logits, tapped = np.float32(shape.epsilon), asked.kept, asked.wanted, asked.logits, asked.tapped
    hidden, normed = strips_of(scratch.hidden, size, tokens), strips_of(scratch.normed, size, tokens)
    now = cycles()
    embed(places.token_ids, ends.embedding, hidden, team)
    team = later(team, 1)
    now = lap(ticks, EMBED, now)
    for layer in range(count):
        norm_all(hidden, ends.input_norm[layer], epsilon, normed, team)
        now = lap(ticks, NORM, now)
        query, now = make_heads(
            layer, normed, scratch, narrow, layers, shape, places, cache, later(team, 1), ticks, now
        )  # fmt: skip
        team = later(team, 1 + HEAD_KERNELS)
        if layer == count - 1:
            if len(kept) == 0:
                return
            # The memory that heads were split from.
            last = strips_of(scratch.qkv, size, len(kept))
            team = team_of(team[0], team[1], len(kept), team[3])
            pick_rows(hidden, kept, last, team)
            team = later(team, 1)
            hidden, tiles = last, last_tiles
        now = finish_layer(
            layer, query, hidden, tiles, scratch, narrow, layers, shape, window, places, cache, team, ticks, now
        )  # fmt: skip
        team = later(team, KERNELS)
        for n in range(len(tapped)):
            if tapped[n] == layer:
                copy_out(hidden, asked.features, n * size, team)
                team = later(team, 1)
    if len(wanted) == 0:
        return
    team = team_of(team[0], team[1], len(wanted), team[3])
    final, normed = strips_of(scratch.hidden, size, len(wanted)), strips_of(scratch.normed, size, len(wanted))
    pick_rows(hidden, wanted, final, team)
    norm_all(final, ends.final_norm, epsilon, normed, later(team, 1))
    row = logits.shape[1] * 4
    project(normed, narrow, head, 0, logits.ctypes.data, final.strides[1], row, 0, later(team, 2))
    lap(ticks, HEAD, now)


@njit(parallel=True, cache=True, nogil=True)
def pick(address, stride, columns, inverse, keys, tokens, lines, threads):  # pragma: no cover
    """`kernels.pick_all` by a team."""
    lines[:threads] = 0
    for member in prange(threads):
        pick_all(address, stride, columns, inverse, keys, tokens, (member, threads, False, lines.ctypes.data))
