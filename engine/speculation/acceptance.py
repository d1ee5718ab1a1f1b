"""How likely a draft token is to be accepted, learnt from those that were verified."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from tailserve.engine.speculation.drafter import Draft

BINS = 10
"""Of confidence."""
MEMORY = 0.995
"""What a token's weight keeps with each further one of its bin."""
PRIOR = 8.0
"""Tokens that a draft's own word weighs."""
DEFAULT_CONFIDENCE = 0.5
OWN_PRIOR, OWN_MEMORY = 4.0, 0.95
"""The same for one sequence's deviation from all of them."""
LOWEST, HIGHEST = 0.02, 0.98


class OwnRecord:
    """How one sequence's drafts fare, compared with what was expected of them."""

    __slots__ = ("expected", "held")

    def __init__(self) -> None:
        self.held = self.expected = OWN_PRIOR

    @property
    def ratio(self) -> float:
        return self.held / self.expected


class Acceptance:
    """Shares of accepted tokens by kind of draft and by confidence; what says 0.8 need not be right in 8 of 10 cases."""

    def __init__(self) -> None:
        self._bins: dict[tuple[str, int], tuple[float, float]] = {}

    def survivals(self, draft: Draft, record: OwnRecord) -> list[float]:
        """For each token, the chance that it and those before it are accepted."""
        chances = [
            min(max(self._estimate(draft.kind, confidence) * record.ratio, LOWEST), HIGHEST)
            for confidence in _confidences(draft)
        ]
        return list(accumulate(chances, mul))

    def observe(self, draft: Draft, offered: int, accepted: int, record: OwnRecord) -> None:
        """The first `offered` tokens were verified, and the first `accepted` of them held."""
        for place, confidence in enumerate(_confidences(draft)[: min(offered, accepted + 1)]):
            held = float(place < accepted)
            record.expected = OWN_MEMORY * (record.expected - OWN_PRIOR) + self._estimate(draft.kind, confidence) + OWN_PRIOR
            record.held = OWN_MEMORY * (record.held - OWN_PRIOR) + held + OWN_PRIOR
            key = (draft.kind, _bin(confidence))
            hits, tries = self._bins.get(key, (PRIOR * confidence, PRIOR))
            self._bins[key] = (MEMORY * hits + held, MEMORY * tries + 1)

    def _estimate(self, kind: str, confidence: float) -> float:
        hits, tries = self._bins.get((kind, _bin(confidence)), (PRIOR * confidence, PRIOR))
        return hits / tries


def _bin(confidence: float) -> int:
    return min(int(confidence * BINS), BINS - 1)


def _confidences(draft: Draft) -> Sequence[float]:
    return draft.confidences or [DEFAULT_CONFIDENCE] * len(draft.token_ids)
