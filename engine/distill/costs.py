"""What a draft costs on this machine, and what it will bring there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from tailserve.engine.cost import StepTimes
from tailserve.engine.model.compiled import fill_head_cache
from tailserve.engine.model.eagle import load_eagle
from tailserve.engine.model.eagle_compiled import can_compile_head
from tailserve.engine.model.eagle_loading import load_eagle_drafter
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.profile import profile_steps
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.drafter import DraftRow, DraftWork, RowStates, StateMessage

CONTEXT = 128
REPEATS = 5
NUM_BLOCKS = 64
WORTH = 1.05
"""A predicted speed-up below this is not worth a draft."""


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds at batch 1."""

    verify: list[float]
    """Of a step with 0, 1, 2, ... draft tokens."""
    draft: list[float]
    """Of drafting 1, 2, ... tokens."""

    def speed_ups(self, accepted: Sequence[float]) -> list[float]:
        """Tokens per second with a draft of 1, 2, ... tokens over those without, given how many are accepted of each."""
        return [
            (1 + count) * self.verify[0] / (self.verify[length] + self.draft[length - 1])
            for length, count in enumerate(accepted, 1)
        ]


def measure_costs(verifier: LoadOptions, folder: Path, depth: int) -> Costs:
    """Times the verifier and the draft in `folder`, alone on the machine."""
    if can_compile_head(load_eagle(folder), torch.bfloat16, verifier.block_size):
        fill_head_cache(torch.bfloat16)
    model, info = load_model(msgspec.structs.replace(verifier, num_blocks=NUM_BLOCKS, max_model_len=NUM_BLOCKS * 16))
    times = StepTimes(profile_steps(model, info.max_model_len))
    drafter = load_eagle_drafter(folder, verifier, num_blocks=NUM_BLOCKS)
    config = load_eagle(folder).config
    width = len(config.feature_layers) * config.hidden_size
    known = CONTEXT

    def take(count: int, start: int) -> None:
        data = torch.zeros(count, width, dtype=torch.int16).numpy().tobytes()
        drafter.take(StateMessage(0, [RowStates(0, start, [1] * count, data)], []))

    take(known, 0)
    draft = []
    for length in range(1, depth + 1):
        fastest = float("inf")
        for _ in range(REPEATS):
            take(1, known)
            known += 1
            begin = time.perf_counter()
            drafter.run(DraftWork(0, 0, [DraftRow(0, known + 1, [], length)], []))
            fastest = min(fastest, time.perf_counter() - begin)
        draft.append(fastest)
    return Costs(verify=[times.predict(1 + length) or 0.0 for length in range(depth + 1)], draft=draft)
