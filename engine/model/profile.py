"""What a step costs on this machine, measured before there is traffic."""

from __future__ import annotations

import time

from tailserve.engine.cost import CONTEXT
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.spans import Span
from tailserve.engine.types import ProfiledStep

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tokens of a step, one a sequence."""
PROMPT = 128
"""Tokens of a prompt."""
LONG, READERS = 1024, 8
"""Tokens of a long context, and the sequences that read one each."""
REPEATS = 3


def profile_steps(model: PagedModel, max_model_len: int) -> tuple[ProfiledStep, ...]:
    """Steps of single tokens at a context of `CONTEXT`; one of a prompt; one that reads long contexts, where the cache and
    the model hold them. Each the fastest of three.

    Writes into the first blocks: nothing may be cached yet.
    """
    size, available = model.block_size, model.num_blocks
    few = range(min(CONTEXT // size + 1, available))
    last = min(CONTEXT, len(few) * size - 1, max_model_len - 1)
    profile = [ProfiledStep(count, _fastest(model, [Span([0], last, few, 1)] * count)) for count in SIZES]
    prompt = min(PROMPT, last + 1)
    profile.append(ProfiledStep(prompt, _fastest(model, [Span([0] * prompt, 0, few, 1)]), prompt - 1))
    # Blocks of their own: what several read of the same ones comes from a cache nearer than memory.
    each = min(min(LONG, max_model_len) // size, available // READERS)
    if each * size >= 2 * CONTEXT:
        start = each * size - 1
        spans = [Span([0], start, range(reader * each, (reader + 1) * each), 1) for reader in range(READERS)]
        profile.append(ProfiledStep(READERS, _fastest(model, spans), 0, READERS * (start + 1 - CONTEXT)))
    return tuple(profile)


def _fastest(model: PagedModel, spans: list[Span]) -> float:
    return min(_time(model, spans) for _ in range(REPEATS))


def _time(model: PagedModel, spans: list[Span]) -> float:
    begin = time.perf_counter()
    # Reading a number waits for the device.
    model.forward(spans)[0, 0].item()
    return time.perf_counter() - begin
