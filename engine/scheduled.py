"""What a step under way does for one sequence."""

from __future__ import annotations

from typing import NamedTuple

from tailserve.engine.sequence import Sequence
from tailserve.engine.speculation.drafter import Draft
from tailserve.engine.types import Candidates


class Scheduled(NamedTuple):
    """One entry of a batch."""

    seq: Sequence
    row: int
    start: int
    length: int
    samples: bool
    drafts: list[list[int]]
    """Tokens to verify: a first draft, and branches beside it."""
    proposed: list[Draft]
    """What each of them is the beginning of."""

    @property
    def candidates(self) -> list[Candidates]:
        """Of the first draft."""
        return self.proposed[0].candidates[: len(self.drafts[0])] if self.proposed else []
