"""Pre-speculation: what the draft prepares while the verifier works, and whether it was what came.

After Speculative Speculative Decoding (Kumar et al., arXiv 2603.03251): while drafted tokens are checked, the draft goes on
from the likely outcomes, that is from each number of accepted tokens and the likeliest tokens to replace the next one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tailserve.engine.speculation.drafter import Draft, Outcome
from tailserve.engine.stats import EngineStats

RANK_DECAY = 0.4
"""Of the chance that the next most likely token is the one that comes."""


def fan_out(survivals: Sequence[float], budget: int) -> list[int]:
    """How many outcomes to prepare for each number of accepted tokens, 0 to len(survivals); `budget` in all.

    One after the other they go to where they are likeliest to be needed: acceptance ends there, times the rank's chance.
    """
    reached = [1.0, *survivals, 0.0]
    ends = [before - after for before, after in pairwise(reached)]
    counts = [0] * len(ends)
    line = [(-chance, place) for place, chance in enumerate(ends)]
    heapq.heapify(line)
    for _ in range(budget):
        chance, place = heapq.heappop(line)
        counts[place] += 1
        heapq.heappush(line, (chance * RANK_DECAY, place))
    return counts


class Foresight:
    """The table of prepared drafts: (row, length, last token) to what follows. Good for one step."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats
        self._table: dict[tuple[int, int, int], Draft] = {}

    def fill(self, outcomes: Iterable[Outcome]) -> None:
        """Takes what was prepared, in place of what was there."""
        self._table = {(outcome.row, outcome.draft.base_len, outcome.token_id): outcome.draft for outcome in outcomes}
        self._stats.foreseen_drafts += len(self._table)

    def look_up(self, row: int, token_ids: Sequence[int]) -> Draft | None:
        """The draft for a row whose tokens these now are."""
        draft = self._table.get((row, len(token_ids), token_ids[-1]))
        if draft is None:
            self._stats.foresight_misses += 1
        else:
            self._stats.foresight_hits += 1
        return draft
