"""How long a step will take, learnt from those that ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from tailserve.engine.types import Batch, ProfiledStep

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Tokens of a step whose times are kept; what lies between is interpolated, and what lies beyond is on the last line."""
CONTEXT = 128
"""Tokens of context, of each sequence, that the times are for."""
WORST = 2.0
"""Times the expected that a step counts as having taken at most: single steps are often far too slow, never far too fast."""
NOISE = 0.06
"""Of a step's time, from one to the next of the same content (standard deviation)."""
DRIFT_ALL, DRIFT_EACH = 0.01, 0.004
"""By how much all times change together, and each for itself, from step to step: a busier machine slows all of them down."""
DOUBT_ALL, DOUBT_EACH, DOUBT_RATE = 0.2, 0.05, 0.3
"""By how much all profiled times may be off together, each for itself, and what logits and context cost for themselves."""
MOVE_WEIGHT = 0.2
"""Of the newest step with moves in the mean time of one."""
REMEMBERED = 512
"""Predictions whose errors are kept."""


class StepTimes:
    """Seconds of a step: a piecewise linear, growing function of its tokens; minus a constant for each token whose logits
    nobody wants; plus a constant for each token of context beyond `CONTEXT` a sequence.

    A Kalman filter over these numbers (Kalman, 1960): what is measured moves what it depends on, by how uncertain it is.
    """

    def __init__(self, profile: Sequence[ProfiledStep | tuple[int, float]] = ()) -> None:
        """`profile`: steps of single tokens at a context of `CONTEXT`, and, for what logits and context cost, others; may be
        empty."""
        self._known = False
        self.move_s = 0.0
        """For each block that is moved between the tiers of KV blocks."""
        self._excess = 0
        self._ratios: deque[float] = deque(maxlen=REMEMBERED)
        steps = [ProfiledStep(*step) for step in profile]
        if plain := sorted(step[:2] for step in steps if not step.unsampled and not step.excess):
            tokens, seconds = (list(values) for values in zip(*plain, strict=True))
            slope = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2]) if len(tokens) > 1 else 0.0
            beyond = [seconds[-1] + max(slope, 0.0) * (size - tokens[-1]) for size in SIZES]
            times = np.where(np.array(SIZES) <= tokens[-1], np.interp(SIZES, tokens, seconds), beyond)
            more = [(step, step.seconds - float(np.interp(step.num_tokens, SIZES, times))) for step in steps]
            saved = [-extra / step.unsampled for step, extra in more if step.unsampled]
            read = [extra / step.excess for step, extra in more if step.excess]
            self._begin(times, max([0.0, *saved]), max([0.0, *read]), doubt=DOUBT_EACH)

    def predict(self, num_tokens: int, *, unsampled: int = 0, excess: int | None = None) -> float | None:
        """Seconds of a step of `num_tokens`, or None before anything is known.

        `unsampled`: those of them whose logits are not wanted. `excess`: tokens of context that are read, beyond `CONTEXT` a
        sequence; by default as many as in the last step.
        """
        if not self._known:
            return None
        low, share = _place(num_tokens)
        heights = self._heights
        seconds = heights[low] + share * (heights[low + 1] - heights[low])
        return max(seconds - self._saved * unsampled + self._read * (self._excess if excess is None else excess), 1e-6)

    def observe(self, num_tokens: int, seconds: float, *, unsampled: int = 0, excess: int = 0) -> None:
        """Learns from a step that ran; one without tokens (it only told that rows are gone) or duration says nothing."""
        if num_tokens <= 0 or seconds <= 0:
            return
        self._excess = excess
        if not self._known:
            self._begin(np.full(len(SIZES), seconds), doubt=0.5)
        expected = self.predict(num_tokens, unsampled=unsampled, excess=excess) or seconds
        self._ratios.append(seconds / expected)
        low, share = _place(num_tokens)
        weights = np.zeros(len(SIZES) + 2)
        weights[low : low + 2] = 1 - share, share
        weights[-2:] = -unsampled, excess
        heights = self._state[:-2]
        self._doubt += DRIFT_ALL**2 * np.outer(self._state, self._state)
        self._doubt[np.diag_indices(len(self._state))] += np.append((DRIFT_EACH * heights) ** 2, self._drift)
        reach = self._doubt @ weights
        gain = reach / (weights @ reach + (NOISE * expected) ** 2)
        self._state += gain * (min(seconds, WORST * expected) - weights @ self._state)
        self._doubt -= np.outer(gain, reach)
        # What was found of one size holds for smaller and larger ones.
        np.minimum(heights[:low], heights[low], out=heights[:low])
        np.maximum(heights[low + 2 :], heights[low + 1], out=heights[low + 2 :])
        self._settle()

    def observe_moves(self, count: int, seconds: float) -> None:
        """Learns from a step that moved `count` blocks first."""
        if count:
            self.move_s += (MOVE_WEIGHT if self.move_s else 1.0) * (seconds / count - self.move_s)

    def errors(self) -> tuple[float, float]:
        """Median and p99 of how far predictions were off lately, as a share of what was predicted; 0 before any."""
        errors = np.abs(np.array(self._ratios or [1.0]) - 1)
        return float(np.median(errors)), float(np.percentile(errors, 99))

    def _begin(self, times: np.ndarray, saved: float = 0.0, read: float = 0.0, *, doubt: float) -> None:
        """`saved` and `read`: what a token's logits and its context cost, 0 if that is not known. `doubt`: of each time by
        itself, as a share of it."""
        self._state = np.append(times, [saved, read])
        slope = max(times[-1] - times[0], times[0]) / SIZES[-1]
        # Logits are a good part of a token's time at most; and a context of some thousands doubles a step's. Where both are
        # known traffic tells little of them: as long as all steps have as much of both, only their sum shows.
        rates = [DOUBT_RATE * saved or 0.3 * slope, DOUBT_RATE * read or 2e-4 * times[0]]
        own = np.append(doubt * times, rates)
        self._doubt = DOUBT_ALL**2 * np.outer(self._state, self._state)
        self._doubt[np.diag_indices(len(own))] += own**2
        self._drift = (DRIFT_EACH * own[-2:]) ** 2
        self._known = True
        self._settle()

    def _settle(self) -> None:
        # More tokens, or more context, never take less time.
        self._heights: list[float] = np.maximum.accumulate(self._state[:-2]).tolist()
        self._saved, self._read = max(float(self._state[-2]), 0.0), max(float(self._state[-1]), 0.0)


def _place(num_tokens: int) -> tuple[int, float]:
    """The index of the size below (the last but one at most), and how far the number is from it to the next; above 1 behind
    the last."""
    # SIZES are the powers of two.
    low = min(num_tokens.bit_length() - 1, len(SIZES) - 2) if num_tokens > 0 else 0
    return low, max(num_tokens - SIZES[low], 0) / SIZES[low]


def count_tokens(batch: Batch) -> int:
    """Tokens that a batch computes, drafts included."""
    branches = sum(len(branch) + 1 for some in batch.branches.values() for branch in some)
    return sum(batch.lengths) + sum(map(len, batch.drafts.values())) + branches


def count_unsampled(batch: Batch) -> int:
    """Those of a batch's tokens whose logits are not wanted."""
    return sum(batch.lengths) - sum(batch.samples)


def count_excess(batch: Batch) -> int:
    """Tokens of context that a batch reads, beyond `CONTEXT` for each sequence."""
    return sum(batch.starts) + sum(batch.lengths) - CONTEXT * len(batch.rows)
