"""Keeps a drafter informed and takes its proposals, without ever depending on it."""

from __future__ import annotations

from collections.abc import Sequence as List

from tailserve.engine.sequence import Sequence
from tailserve.engine.speculation.drafter import Draft, Drafter, DraftRow, DraftWork
from tailserve.engine.stats import EngineStats

MAX_REST_LOG2 = 8


class DraftCoordinator:
    """Sends token deltas after each step and collects drafts before the next.

    The wait is bounded by `timeout_s`, and a draft that missed it once is not waited for, nor asked anything new, until
    its late answer shows that it is back: a hanging draft costs the batch one timeout, not one per step. One that is late
    again and again is asked less and less often: after k late answers in a row it rests for 2**k steps.
    """

    def __init__(self, drafter: Drafter, *, num_tokens: int, timeout_s: float, stats: EngineStats) -> None:
        self._drafter = drafter
        self._num_tokens = num_tokens
        self._timeout_s = timeout_s
        self._stats = stats
        self._known: dict[int, int] = {}
        """Row to the number of its tokens that the drafter has."""
        self._asked: int | None = None
        self._late = False
        self._late_in_a_row = 0
        self._rest = 0
        self._incarnation = drafter.incarnation

    def start(self, step: int, running: List[Sequence]) -> None:
        """Asks for drafts for every sequence that generates."""
        self._notice_restart()
        if self._asked is not None:
            return
        if self._rest > 0:
            self._rest -= 1
            return
        rows = []
        known: dict[int, int] = {}
        for seq in running:
            if seq.row is not None and seq.num_pending == 1 and seq.slo.speculate:
                keep = self._known.get(seq.row, 0)
                rows.append(DraftRow(seq.row, keep, seq.token_ids[keep:]))
                known[seq.row] = len(seq.token_ids)
        leaves = [row for row in self._known if row not in known]
        if not rows and not leaves:
            return
        if self._drafter.send(DraftWork(step, self._num_tokens, rows, leaves)):
            self._known = known
            self._asked = step

    def collect(self) -> dict[int, Draft]:
        """Row to draft; empty if there is none in time."""
        self._notice_restart()
        if self._asked is None:
            return {}
        result = self._drafter.receive(self._asked, 0.0 if self._late else self._timeout_s)
        if result is None:
            self._stats.draft_timeouts += not self._late
            self._late = True
            return {}
        self._asked = None
        self._late_in_a_row = self._late_in_a_row + 1 if self._late else 0
        self._rest = 2 ** min(self._late_in_a_row, MAX_REST_LOG2) if self._late else 0
        self._late = False
        return result.drafts

    def _notice_restart(self) -> None:
        if self._drafter.incarnation != self._incarnation:
            self._incarnation = self._drafter.incarnation
            self._known = {}
            self._asked = None
            self._late = False
            self._late_in_a_row = self._rest = 0
