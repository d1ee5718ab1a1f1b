"""Keeps a drafter informed and takes its proposals, without ever depending on it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as List

import msgspec

from tailserve.engine.options import MAX_BRANCHES
from tailserve.engine.sequence import Sequence
from tailserve.engine.speculation.drafter import Draft, Drafter, DraftResult, DraftRow, DraftWork, OutcomeRow
from tailserve.engine.speculation.foresight import Foresight, fan_out
from tailserve.engine.speculation.policy import FEW, DraftPolicy
from tailserve.engine.stats import EngineStats
from tailserve.engine.types import Batch

MAX_REST_LOG2 = 8
AUTO_TOKENS = 8
"""Draft tokens at most where a class leaves their number to the policy."""


def draft_limit(speculation: str | int) -> int:
    """Draft tokens per step, at most, of a class."""
    if isinstance(speculation, int):
        return speculation
    return AUTO_TOKENS if speculation == "auto" else 0


class DraftCoordinator:
    """Sends token deltas after each step and collects drafts before the next.

    The wait is bounded by `timeout_s`, and a draft that missed it once is not waited for, nor asked anything new, until
    its late answer shows that it is back: a hanging draft costs the batch one timeout, not one per step. One that is late
    again and again is asked less and less often: after k late answers in a row it rests for 2**k steps.
    """

    def __init__(
        self,
        drafter: Drafter,
        policy: DraftPolicy,
        *,
        sampled: bool = False,
        num_outcomes: int = 0,
        width: int = 1,
        timeout_s: float,
        stats: EngineStats,
    ) -> None:
        """`sampled`, `num_outcomes`: see `EngineConfig`; `width`: see `DraftRow`."""
        self._drafter = drafter
        self._policy = policy
        self._sampled = sampled
        self._num_outcomes = num_outcomes
        # What is prepared ahead follows from one draft only.
        self._width = 1 if num_outcomes else width
        self._timeout_s = timeout_s
        self._stats = stats
        self._foresight = Foresight(stats)
        self._known: dict[int, int] = {}
        """Row to the number of its tokens that the drafter has."""
        self._asked: DraftWork | None = None
        """What is to be answered next."""
        self._asked_rows = 0
        self.awaits_prefix = False
        """What was asked are the first tokens of answers."""
        self._number = 0
        self._late = False
        self._late_in_a_row = 0
        self._rest = 0
        self._reached = True
        self._incarnation = drafter.incarnation

    def wanted(self, running: List[Sequence]) -> bool:
        """Whether these sequences, or the first to come, are to have drafts: nothing is scheduled behind a step then."""
        if not running:
            return self._policy.pays(1)
        speculations = {seq.slo.speculation for seq in running}
        if any(isinstance(speculation, int) and speculation > 0 for speculation in speculations):
            return True
        return "auto" in speculations and self._policy.pays(len(running))

    def with_states(self, batch: Batch, running: List[Sequence]) -> Batch:
        """The batch, so that the draft gets hidden states of it where any of the sequences may have drafts: a gap costs a
        head what it knows of a sequence, so while drafting rests they go on as long as they are few."""
        may = any(draft_limit(seq.slo.speculation) for seq in running) and (len(running) <= FEW or self.wanted(running))
        return msgspec.structs.replace(batch, states=True) if may else batch

    def start(self, step: int, running: List[Sequence], *, states: bool = False) -> None:
        """Asks for drafts for the sequences that generate, where they pay. `states`: see `DraftWork`."""
        self._notice_restart()
        if self._asked is not None:
            return
        if self._rest > 0:
            self._rest -= 1
            return
        self._ask(step, running, states)

    @property
    def available(self) -> bool:
        """Whether the draft has been heard of lately."""
        return self._reached and not self._late and self._rest == 0

    def ask_prefixes(self, running: List[Sequence]) -> None:
        """Asks for the first tokens of answers whose prompts are being read; again where one round was not enough."""
        self._notice_restart()
        waiting = [seq for seq in running if seq.awaits_prefix]
        if waiting and self._asked is None and self._rest == 0:
            rows = []
            for seq in waiting:
                temperature = seq.request.sampling.temperature
                row = self._delta(seq, seq.slo.speculative_prefix)
                rows.append(msgspec.structs.replace(row, temperature=temperature))
            self._send(0, running, rows)
            self.awaits_prefix = self._asked is not None

    def take_prefixes(self) -> dict[int, list[int]]:
        """Row to the first tokens of its answer, if they are there already."""
        if not self.awaits_prefix:
            return {}
        assert self._asked is not None
        result = self._drafter.receive(self._asked.number, 0.0)
        if result is None:
            return {}
        self._asked, self.awaits_prefix = None, False
        self._stats.draft_seconds += result.duration_s
        return {row: draft.token_ids for row, draft in result.drafts.items()}

    @property
    def foresees(self) -> bool:
        """Whether `foresee` would ask anything now."""
        return self._num_outcomes > 0 and not self._sampled and self._asked is None and self._rest == 0

    def foresee(self, step: int, running: List[Sequence], drafts: Mapping[int, tuple[List[int], List[float]]]) -> None:
        """Asks what may follow a step that has just begun. `drafts`: for each row that samples, the draft tokens, which
        may be none, and their survivals."""
        rows, outcomes = [], []
        for seq in running:
            limit = draft_limit(seq.slo.speculation)
            if limit and seq.row is not None and seq.row in drafts:
                tokens, survivals = drafts[seq.row]
                rows.append(self._delta(seq, limit))
                outcomes.append(OutcomeRow(seq.row, list(tokens), fan_out(survivals, self._num_outcomes)))
        self._send(step, running, rows, outcomes=outcomes)

    def collect(self, running: List[Sequence]) -> dict[int, Draft]:
        """Row to draft; empty if there is none in time."""
        self._notice_restart()
        asked, until = self._asked, time.monotonic() + self._timeout_s
        if asked is None or self.awaits_prefix:
            return {}
        result = self._receive(until)
        if result is None or not asked.outcomes:
            return {} if result is None else result.drafts
        self._foresight.fill(result.outcomes)
        foreseen = {outcome.row for outcome in asked.outcomes}
        found = {
            seq.row: draft
            for seq in running
            if seq.row in foreseen and seq.num_pending == 1 and (draft := self._foresight.look_up(seq.row, seq.token_ids))
        }
        if found or self._rest > 0:
            # The others go without: nobody waits for their drafts.
            return found
        self._ask(asked.step, running, states=False)
        result = self._receive(until) if self._asked is not None else None
        return {} if result is None else result.drafts

    def _ask(self, step: int, running: List[Sequence], states: bool) -> None:
        generating = [seq for seq in running if seq.row is not None and seq.num_pending == 1]
        pays = self._policy.pays(len(generating))
        least = self._policy.least(len(generating)) if generating else 0.0
        width = min(self._width, 1 + MAX_BRANCHES // max(len(generating), 1))
        rows = []
        for seq in generating:
            limit = draft_limit(seq.slo.speculation) if pays or seq.slo.speculation != "auto" else 0
            if limit:
                # Who asks for a number of tokens gets them, however unlikely they are.
                own_least = least if seq.slo.speculation == "auto" else 0.0
                rows.append(msgspec.structs.replace(self._delta(seq, limit, width), least=own_least))
        self._asked_rows = len(generating)
        self._send(step, running, rows, states=states)

    def _delta(self, seq: Sequence, limit: int, width: int = 1) -> DraftRow:
        assert seq.row is not None
        keep = self._known.get(seq.row, 0)
        sampling = seq.request.sampling
        temperature = sampling.temperature if self._sampled else 0.0
        width = 1 if temperature > 0 else width
        root = b"" if keep else seq.root
        trace = "" if keep else seq.request.traceparent
        return DraftRow(
            seq.row, keep, seq.token_ids[keep:], limit, temperature, sampling.seed, width, traceparent=trace, root=root
        )

    def _send(
        self,
        step: int,
        running: List[Sequence],
        rows: list[DraftRow],
        *,
        states: bool = False,
        outcomes: list[OutcomeRow] | None = None,
    ) -> None:
        present = {seq.row for seq in running}
        leaves = [row for row in self._known if row not in present]
        if not rows and not leaves:
            return
        self._number += 1
        work = DraftWork(self._number, step, rows, leaves, states, outcomes or [])
        self._reached = self._drafter.send(work)
        if self._reached:
            for row in leaves:
                del self._known[row]
            for entry in rows:
                self._known[entry.row] = entry.keep + len(entry.token_ids)
            # Nobody waits to hear that rows are gone.
            self._asked = work if rows else None

    def _receive(self, until: float) -> DraftResult | None:
        assert self._asked is not None
        left_s = max(until - time.monotonic(), 0.0)
        result = self._drafter.receive(self._asked.number, 0.0 if self._late else left_s)
        if result is None:
            self._stats.draft_timeouts += not self._late
            self._late = True
            return None
        if not self._asked.outcomes:
            longest = max((len(draft.token_ids) for draft in result.drafts.values()), default=0)
            self._policy.note_draft(self._asked_rows, longest, result.duration_s)
        self._stats.draft_seconds += result.duration_s
        self._asked = None
        self._late_in_a_row = self._late_in_a_row + 1 if self._late else 0
        self._rest = 2 ** min(self._late_in_a_row, MAX_REST_LOG2) if self._late else 0
        self._late = False
        return result

    def _notice_restart(self) -> None:
        if self._drafter.incarnation != self._incarnation:
            self._incarnation = self._drafter.incarnation
            self._known = {}
            self._asked, self.awaits_prefix = None, False
            self._late = False
            self._late_in_a_row = self._rest = 0
            self._reached = True
