"""Who is in a step, and with how many tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List
from heapq import merge
from itertools import islice

from tailserve.engine import line, slo
from tailserve.engine.cost import StepTimes
from tailserve.engine.places import Places
from tailserve.engine.planner import Planner, StepPlan
from tailserve.engine.residency import Residency
from tailserve.engine.scheduled import Scheduled
from tailserve.engine.sequence import Sequence

PROMISED_S, PROMISED_SHARE = 0.5, 0.02
"""How often a sequence that had waited for too long gets a token at least, and of this time what the step may take longer to
read of its prompt, whatever there is to do for others."""
FORESEEN_PROMPTS = 8
"""Waiting prompts of a class whose hurry a step considers."""


class Composition:
    """Puts a step together: level by level, most urgent first. In each those that generate come before prompts, but for the
    share of the time that prompts in a hurry need; who is furthest behind comes first where not all fit."""

    def __init__(self, planner: Planner, residency: Residency, places: Places, times: StepTimes) -> None:
        self._most = residency.config.max_num_seqs
        self._paced = residency.config.paced
        self._by_level: dict[int, set[str]] = {}
        """Level to the names of its classes."""
        for some in residency.config.classes:
            self._by_level.setdefault(some.priority, set()).add(some.name)
        self._most_urgent = min(some.priority for some in residency.config.classes)
        self._planner = planner
        self._residency = residency
        self._places = places
        self._times = times

    def compose(self, now: float, start: float) -> tuple[list[Scheduled], dict[int, list[int]], StepPlan]:
        """The entries of a step that will begin at `start`, without drafts; the blocks they get; and what they take."""
        residency = self._residency
        self._now = now
        plan = self._planner.open(residency.running, residency.host, now, start)
        self._work: list[Scheduled] = []
        self._new_blocks: dict[int, list[int]] = {}
        self._admitting = True
        self._num_running = Counter(seq.slo.name for seq in residency.running)
        held_back: list[Sequence] = []
        levels = line.levels(residency.running, residency.waiting)
        first = next((level for level in levels if level >= self._most_urgent), None)
        # One that had waited for too long comes before all classes: it has a place, but of a step what the first leaves it.
        if residency.waiting and residency.waiting[0].promoted:
            self._start(residency.waiting[0], residency.waiting[:1])
        levels.sort(key=lambda level: (level != first, level))
        for level in levels:
            running = line.of_level(residency.running, level)
            prompts = [seq for seq in running if seq.num_pending > 1 or seq.awaits_prefix]
            generating = [seq for seq in running if seq.num_pending == 1 and not seq.awaits_prefix]
            # Those that lose their place in this step shall not find it again in the same.
            waiting = self._first_waiting(level) if self._admitting else []
            fresh = (*prompts, *waiting[:FORESEEN_PROMPTS])
            share = slo.hurry(fresh, now, self._times) if self._paced else 0.0
            held_back += self._generate(plan, generating, share, sure=level == first)
            self._read(plan, prompts, waiting, share)
        # What prompts left.
        self._take(plan, held_back[: plan.count_generating(held_back, plan.limit_s)])
        # Whoever lost its place to one that came after it in the step is not in it.
        work = [entry for entry in self._work if entry.seq.row == entry.row]
        rows = {seq.row for seq in residency.running}
        return work, {row: blocks for row, blocks in self._new_blocks.items() if row in rows}, plan

    def _first_waiting(self, level: int) -> list[Sequence]:
        """As many of those that wait in a level and may start as a step could take, in line."""
        # Once for each class: behind one that is full there may be thousands. Who is promoted has a level of its own.
        classes = self._by_level.get(level, set())
        full = {name for name in classes if not self._has_place(name)}
        if full and full == classes:
            return []
        waiting = self._places.in_turn(line.of_level(self._residency.waiting, level))
        return list(islice((seq for seq in waiting if seq.slo.name not in full), self._most))

    def _generate(self, plan: StepPlan, seqs: list[Sequence], share: float, *, sure: bool) -> list[Sequence]:
        """Adds sequences that generate, as far as there is time; returns those for which there is none. For guarded ones
        that are `sure` of it there is."""
        if not seqs:
            return []
        if sure and self._planner.is_guarded(seqs[0]):
            fitting = min(len(seqs), plan.tokens_left)
        else:
            limit = plan.limit_s - share * max(plan.limit_s - plan.seconds, 0.0) if share else plan.limit_s
            fitting = plan.count_generating(seqs, limit)
            if fitting < len(seqs):
                seqs.sort(key=slo.next_due)
                # A step without anything would be none.
                fitting = max(plan.count_generating(seqs, limit), plan.empty or self._is_promised(seqs[0]))
        self._take(plan, seqs[:fitting])
        return seqs[fitting:]

    def _take(self, plan: StepPlan, seqs: List[Sequence]) -> None:
        # In line, so that whoever yields a block to another is behind it.
        for seq in sorted(seqs, key=line.place_in_line):
            if seq.row is not None and self._residency.extend(seq, seq.num_scheduled + 1, self._new_blocks):
                self._work.append(Scheduled(seq, seq.row, seq.num_scheduled, 1, samples=True, drafts=[], proposed=[]))
                plan.add_generating(seq)

    def _read(self, plan: StepPlan, running: List[Sequence], waiting: List[Sequence], share: float) -> None:
        """Adds chunks of prompts, in line; those that wait begin where there is a place for them."""
        # Levels are all guarded or all not.
        urgent_s = max(plan.limit_s, plan.seconds / (1 - share))
        for seq in merge(running, waiting, key=self._places.turn):
            known = seq.row is not None
            if not known and not self._may_start(seq):
                continue
            urgent = self._is_urgent(seq)
            reading_s = plan.in_debt_s if self._places.is_in_debt(seq) else plan.reading_s
            limit = urgent_s if urgent else reading_s
            if promised := self._is_promised(seq):
                limit = max(limit, plan.seconds + PROMISED_SHARE * PROMISED_S)
            wanted = self._wanted(seq) if known else 1
            progress = promised or (plan.empty and not plan.loads and plan.prompt_tokens_left)
            if not (plan.count_prompt(seq, wanted, limit, urgent=urgent) or progress):
                return
            if known or self._start(seq, waiting):
                self._add_chunk(plan, seq, limit)

    def _may_start(self, seq: Sequence) -> bool:
        return self._admitting and (seq.promoted or self._has_place(seq.slo.name))

    def _has_place(self, name: str) -> bool:
        """Whether one more of a class may start."""
        return self._places.are_left(name, self._num_running[name], self._planner.cap(name))

    def _is_urgent(self, seq: Sequence) -> bool:
        return self._paced and self._planner.is_guarded(seq)

    def _is_promised(self, seq: Sequence) -> bool:
        return seq.promoted and self._now > seq.moved_s + PROMISED_S

    def _wanted(self, seq: Sequence) -> int:
        """Tokens of its prompt that a step may read of a running sequence."""
        wanted = seq.num_pending - seq.awaits_prefix
        if wanted == 0:
            # The last one: nobody waits for a draft that has not come by now.
            seq.awaits_prefix, wanted = False, 1
        return wanted

    def _start(self, seq: Sequence, waiting: List[Sequence]) -> bool:
        # Not one that has lost its place in this very step.
        if seq in waiting:
            self._admitting = self._residency.admit(seq)
            self._num_running[seq.slo.name] += self._admitting
            if self._admitting:
                self._places.note_start(seq)
        return seq.row is not None

    def _add_chunk(self, plan: StepPlan, seq: Sequence, limit: float) -> None:
        if self._residency.load(seq, plan.count_moves(limit), self._new_blocks):
            plan.loads, seq.moved_s = True, self._now
            return  # the rest comes with the next steps
        wanted = self._wanted(seq)
        urgent = self._is_urgent(seq)
        least = int(plan.empty or self._is_promised(seq))
        count = max(plan.count_prompt(seq, wanted, limit, urgent=urgent), min(wanted, least, plan.tokens_left))
        if count and self._residency.extend(seq, seq.num_scheduled + count, self._new_blocks):
            assert seq.row is not None
            samples = count == seq.num_pending
            self._work.append(Scheduled(seq, seq.row, seq.num_scheduled, count, samples, drafts=[], proposed=[]))
            plan.add_prompt(seq, count, sampled=samples)
