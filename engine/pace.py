"""How many sequences of a class may run, so that those that run keep their pace: the dynamic batch size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as List

from tailserve.engine.cost import CONTEXT, StepTimes
from tailserve.engine.sequence import Sequence
from tailserve.engine.types import SloClass

REVIEW_S = 0.1
"""How often the paces of classes are looked at."""
NEAR, ROOM = 0.95, 0.85
"""Of a class's time per output token: where its p99 is above the first its cap falls, where below the other it grows."""
SHRINK, GROW = 0.93, 1.03
"""What the cap is multiplied by then; it grows by one more at least."""
AIM, LEAST_AIM, MOST_AIM = 0.8, 0.6, 0.95
"""Of a class's time per output token, what is aimed at: at first, and between which."""
TIGHTEN, LOOSEN = 0.96, 1.0002
"""What the aim is multiplied by when an answer of a guarded class came near to the class's time, or did not. In balance one
answer in two hundred does."""
PROGRESS = 1.25
"""A step's limit is never below this many times what a step of one token takes."""


class Pace:
    """One class's pace. Its cap: as many sequences as a step within its time per output token holds, by step times; fewer
    while those that run see hardly less than that time. More urgent classes, prompts and a busy machine show in what they
    see."""

    def __init__(self, slo: SloClass, times: StepTimes, max_num_seqs: int, *, guarded: bool) -> None:
        """`guarded`: steps are kept short enough for it, whatever there is to do. Its cap goes by step times alone then."""
        self._guarded = guarded
        self._slo = slo
        self._times = times
        self._most = max_num_seqs
        self._allowed = float(max_num_seqs)
        self._aim = AIM
        self.cap = max_num_seqs
        """Sequences of the class that may run."""
        self.p99_s = 0.0
        """Time per token that all but one in a hundred of the running sequences see, as of late; 0 if none generates."""

    @property
    def aimed_s(self) -> float:
        """Seconds for each of a sequence's tokens that are aimed at: the more bursts and noise there are, the less."""
        return self._aim * self._slo.tpot_s

    def note_end(self, seq: Sequence) -> None:
        """An answer of the class is complete, with its last token made just now."""
        if not self._guarded or seq.begun_s is None or seq.token_s is None or seq.num_output < 2:
            return
        if seq.num_preemptions:
            return  # it was the place that it lacked, not the pace
        near = seq.token_s - seq.begun_s > NEAR * self._slo.tpot_s * (seq.num_output - 1)
        self._aim = min(max(self._aim * (TIGHTEN if near else LOOSEN), LEAST_AIM), MOST_AIM)

    def review(self, running: List[Sequence]) -> None:
        """Looks at the class's running sequences; to be called every `REVIEW_S`."""
        paces = sorted(seq.pace_s for seq in running if seq.pace_s is not None)
        self.p99_s = paces[min(int(0.99 * len(paces)), len(paces) - 1)] if paces else 0.0
        target = self._slo.tpot_s
        # Those that run stay: with more of them than the cap allows, their pace says nothing of it.
        if self.p99_s > NEAR * target and len(running) <= self.cap and not self._guarded:
            self._allowed = SHRINK * len(running)
        elif self.p99_s < ROOM * target:
            self._allowed = GROW * self._allowed + 1
        contexts = sum(seq.num_computed for seq in running) // len(running) if running else CONTEXT
        # What makes a step hardly longer costs nobody anything, whatever the target.
        free = PROGRESS * (self._times.predict(1, excess=0) or 0.0)
        fitting = self._fitting(max(target, free), contexts - CONTEXT)
        self._allowed = max(min(self._allowed, fitting), 1.0)
        self.cap = int(self._allowed)

    def _fitting(self, seconds: float, excess: int) -> int:
        """Sequences of which a step takes so long, each with so much more context than `CONTEXT`."""
        return bisect_right(
            range(1, self._most + 1), seconds, key=lambda count: self._times.predict(count, excess=count * excess) or 0.0
        )
