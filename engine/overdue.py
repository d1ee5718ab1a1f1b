"""Sequences whose targets are out of reach, and those that have waited for too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from tailserve.engine import slo
from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import StepTimes
from tailserve.engine.line import begin_of_late, begin_of_level, is_in
from tailserve.engine.residency import Residency
from tailserve.engine.sequence import Sequence

SEARCH_S = 0.5
"""How often somebody who has waited for too long is looked for, and who is spared by now."""
SPARED_SHARE = 0.5
"""Tenants with less than this much of their equal share of a class's queue are not the reason why it is long."""
TURN_EVERY = 5
"""Of so many requests of a class that begin one is late, where any are: others' targets are not worth a wait without end."""
FORESEEN = 32
"""Waiting sequences of a class that are looked at behind one that can be in time."""


class Overdue:
    """Changes places in line. Whose first token cannot be in time goes behind those whose can, until it has it (Niyama's
    relegation), unless its tenant has few in line: others' load shall not cost it its turn. Now and then the first of those
    that went behind has its turn all the same. Of those for which nothing was done for `max_wait_s`, the oldest is first in
    line until it ends; then the next."""

    def __init__(self, config: EngineConfig, times: StepTimes, residency: Residency) -> None:
        self._config = config
        self._times = times
        self._residency = residency
        self._first = min(some.priority for some in config.classes) - 1
        self._searched_s = float("-inf")
        self._few: dict[str, float] = {}
        """Class to how few of its requests in line spare a tenant."""
        self._turns: dict[str, Sequence] = {}
        """Class to the last one that was late and had its turn."""
        self._begun_at_turn: Counter[str] = Counter()
        """Class to how many of its requests had begun then."""

    def review(self, sequences: Collection[Sequence], now: float) -> None:
        """Looks at those that wait, and now and then at all of them."""
        if not self._config.paced:
            return
        if now >= self._searched_s + SEARCH_S:
            self._searched_s = now
            self._promote(sequences, now)
            self._spare()
            self._give_turns()
        self._relegate(now)

    def _promote(self, sequences: Collection[Sequence], now: float) -> None:
        if not sequences or any(seq.promoted for seq in sequences):
            return
        oldest = min(sequences, key=lambda seq: seq.moved_s)
        if now - oldest.moved_s > self._config.max_wait_s:
            oldest.promoted = True
            self._residency.move(oldest, oldest.key._replace(level=self._first, late=False))

    def restore(self, seq: Sequence) -> None:
        """It has its first token: the next are due like everybody's."""
        if seq.key.late:
            self._residency.move(seq, seq.key._replace(late=False))

    def _relegate(self, now: float) -> None:
        waiting = self._residency.waiting
        for level in {some.priority for some in self._config.classes}:
            place = begin_of_level(waiting, level)
            end = place + FORESEEN
            while place < min(len(waiting), end):
                seq = waiting[place]
                if seq.key.level != level or seq.key.late:
                    break
                hopeless = seq.due_s is None and slo.hopeless(seq, now, self._times)
                if hopeless and not self._is_spared(seq) and self._turns.get(seq.slo.name) is not seq:
                    self._residency.move(seq, seq.key._replace(late=True))
                else:
                    place += 1

    def _give_turns(self) -> None:
        waiting, begun = self._residency.waiting, self._residency.started
        for some in self._config.classes:
            last = self._turns.get(some.name)
            if last is not None and is_in(waiting, last):
                continue
            late = waiting[begin_of_late(waiting, some.priority) : begin_of_level(waiting, some.priority + 1)]
            first = next((seq for seq in late if seq.slo.name == some.name), None)
            if first is not None and begun[some.name] >= self._begun_at_turn[some.name] + TURN_EVERY:
                self._turns[some.name] = first
                self._begun_at_turn[some.name] = begun[some.name]
                self.restore(first)

    def _spare(self) -> None:
        counts: dict[str, list[int]] = {some.name: [] for some in self._config.classes}
        for (name, _), count in self._residency.queued.items():
            counts[name].append(count)
        self._few = {name: SPARED_SHARE * sum(some) / max(len(some), 1) for name, some in counts.items()}
        for seq in [seq for seq in self._residency.waiting if seq.key.late and self._is_spared(seq)]:
            self.restore(seq)

    def _is_spared(self, seq: Sequence) -> bool:
        return self._residency.queued[seq.group] < self._few[seq.slo.name]
