"""How long a step will take, learnt from those that ran."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from tailserve.engine.types import Batch

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Tokens of a step whose times are kept; what lies between is interpolated."""
WEIGHT = 0.2
"""Of the newest step in a size's running mean."""
DRIFT = 0.02
"""What of its deviation the other sizes take over: longer contexts and a busier machine slow all of them down."""
WORST = 2.0
"""Times the expected that a step counts as having taken at most. Were only what the others take over limited, they would
sink: single steps are often far too slow, and never far too fast."""


class StepTimes:
    """Seconds of a step by its number of tokens. Grows with it, whatever single steps say."""

    def __init__(self, profile: Sequence[tuple[int, float]] = ()) -> None:
        """`profile`: tokens and seconds of steps that were measured before there was traffic; may be empty."""
        self._means: dict[int, float] = {}
        for num_tokens, seconds in sorted(profile):
            self._means[self._around(num_tokens)[0]] = seconds

    def predict(self, num_tokens: int) -> float | None:
        """Seconds, or None if no step of about that size is known."""
        low, high, share = self._around(num_tokens)
        if low not in self._means or high not in self._means:
            return self._means.get(low, self._means.get(high))
        return self._means[low] + share * (self._means[high] - self._means[low])

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learns from a step that ran; one without tokens (it only told that rows are gone) or duration says nothing."""
        if num_tokens <= 0 or seconds <= 0:
            return
        low, high, share = self._around(num_tokens)
        expected = self.predict(num_tokens)
        if expected is None:
            self._means[low] = self._means[high] = seconds
            return
        seconds = min(seconds, WORST * expected)
        error = seconds - expected
        for size in self._means:
            self._means[size] *= 1 + DRIFT * error / expected
        error = seconds - (self.predict(num_tokens) or 0.0)
        for size, part in ((low, 1 - share), (high, share)):
            if part:
                self._means[size] = self._means.get(size, seconds) + WEIGHT * part * error
        least = 0.0
        for size in sorted(self._means):
            least = self._means[size] = max(self._means[size], least)

    @staticmethod
    def _around(num_tokens: int) -> tuple[int, int, float]:
        """The sizes on both sides, and how far it is from the lower to the higher, 0 to 1."""
        place = bisect_right(SIZES, num_tokens) - 1
        if place < 0 or place + 1 >= len(SIZES) or SIZES[place] == num_tokens:
            size = SIZES[max(place, 0)]
            return size, size, 0.0
        low, high = SIZES[place], SIZES[place + 1]
        return low, high, (num_tokens - low) / (high - low)


def count_tokens(batch: Batch) -> int:
    """Tokens that a batch computes, drafts included."""
    branches = sum(len(branch) + 1 for some in batch.branches.values() for branch in some)
    return sum(batch.lengths) + sum(map(len, batch.drafts.values())) + branches
