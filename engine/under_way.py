"""What the engine remembers of a submitted step."""

from __future__ import annotations

from typing import NamedTuple

from tailserve.engine.cost import StepTimes, count_excess, count_tokens, count_unsampled
from tailserve.engine.types import Batch, StepResult


class StepUnderWay(NamedTuple):
    """What its batch says of its time, and of drafting."""

    num_tokens: int
    unsampled: int
    excess: int
    """`unsampled` and `excess`: see `StepTimes.predict`."""
    num_sequences: int
    only_generates: bool
    drafted: bool
    """Drafts were asked for, whether or not there were any."""
    states: bool
    """The draft gets hidden states of it."""
    has_drafts: bool
    num_moves: int

    @classmethod
    def of(cls, batch: Batch, *, drafted: bool) -> StepUnderWay:
        only_generates = bool(batch.rows) and all(batch.samples) and all(length == 1 for length in batch.lengths)
        return cls(
            num_tokens=count_tokens(batch),
            unsampled=count_unsampled(batch),
            excess=count_excess(batch),
            num_sequences=len(batch.rows),
            only_generates=only_generates and not batch.moves,
            drafted=drafted,
            states=batch.states,
            has_drafts=bool(batch.drafts),
            num_moves=len(batch.moves),
        )

    def predict(self, times: StepTimes) -> float | None:
        """Seconds it will take; None before anything is known."""
        seconds = times.predict(self.num_tokens, unsampled=self.unsampled, excess=self.excess)
        return None if seconds is None else seconds + self.num_moves * times.move_s

    def teach(self, times: StepTimes, result: StepResult) -> None:
        """What it took says of later steps."""
        computed_s = result.duration_s - result.moved_s
        times.observe(self.num_tokens, computed_s, unsampled=self.unsampled, excess=self.excess)
        times.observe_moves(self.num_moves, result.moved_s)
