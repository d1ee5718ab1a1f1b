"""How long a step will take, learnt from those that ran."""

from __future__ import annotations

from tailserve.engine.types import Batch

WEIGHT = 0.2
"""Of the newest step in the running mean."""


class StepTimes:
    """A running mean for each power of two of tokens in a step: steps of one size cost about the same."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}

    def predict(self, num_tokens: int) -> float | None:
        """Seconds, or None if no step of that size has run yet."""
        return self._means.get(num_tokens.bit_length())

    def observe(self, num_tokens: int, seconds: float) -> None:
        size = num_tokens.bit_length()
        mean = self._means.get(size, seconds)
        self._means[size] = mean + WEIGHT * (seconds - mean)


def count_tokens(batch: Batch) -> int:
    """Tokens that a batch computes, drafts included."""
    return sum(batch.lengths) + sum(map(len, batch.drafts.values()))
