"""What a step costs on this machine, measured before there is traffic."""

from __future__ import annotations

import time

from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.spans import Span

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tokens of a step."""
CONTEXT = 128
REPEATS = 3


def profile_steps(model: PagedModel) -> tuple[tuple[int, float], ...]:
    """(tokens, seconds) of steps of single tokens at a context of 128, each the fastest of three.

    Writes into the first blocks: nothing may be cached yet.
    """
    count = min(CONTEXT // model.block_size + 1, model.num_blocks)
    blocks = range(count)
    last = min(CONTEXT, count * model.block_size - 1)
    profile = []
    for size in SIZES:
        spans = [Span([0], last, blocks, 1)] * size
        fastest = min(_time(model, spans) for _ in range(REPEATS))
        profile.append((size, fastest))
    return tuple(profile)


def _time(model: PagedModel, spans: list[Span]) -> float:
    begin = time.perf_counter()
    # Reading a number waits for the device.
    model.forward(spans)[0, 0].item()
    return time.perf_counter() - begin
