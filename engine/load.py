"""How busy an engine is, as admission sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tailserve.engine.cost import StepTimes
from tailserve.engine.line import begin_of_level
from tailserve.engine.scheduler import Scheduler
from tailserve.engine.sequence import Sequence
from tailserve.engine.types import SloClass


class ClassLoad(NamedTuple):
    """What the engine says of a class, as of its last step."""

    free_slots: int
    """Slots that it finds: free ones, and those that less urgent classes give up."""
    queued: Counter[str]
    """Tenant to requests that wait for their first slot."""
    num_started: int
    """Requests that have had it since the engine began."""
    reading_s: float
    """Time to read the prompts that are before those in this class's queue and not read; 0 where it was not asked for."""
    waiting_s: Mapping[str, float]
    """Tenant to the time to read the prompts that it has in this class's queue; empty where it was not asked for."""


class Load(NamedTuple):
    """What the engine says of itself, as of its last step."""

    token_s: float
    """Seconds to read a token of a prompt."""
    classes: Mapping[str, ClassLoad]


def measure_load(scheduler: Scheduler, times: StepTimes, *, reading: bool) -> Load:
    """The load as of the last step. `reading`: what there is to read, too, which is O(sequences); a class with `admission:
    reject` needs that in any case."""
    residency, config = scheduler.residency, scheduler.config
    queued: dict[str, Counter[str]] = {slo.name: Counter() for slo in config.classes}
    for (name, tenant), count in residency.queued.items():
        if count:
            queued[name][tenant] = count
    many = config.max_num_batched_tokens
    token_s = (times.predict(many, unsampled=many, excess=0) or 0.0) / many
    reading = reading or any(slo.admission == "reject" for slo in config.classes)
    running, waiting = (_unread(residency.running), _unread(residency.waiting)) if reading else (Counter(), Counter())
    classes = {
        slo.name: ClassLoad(
            config.max_num_seqs - _num_ahead(scheduler, slo),
            queued[slo.name],
            residency.started[slo.name],
            token_s * (_before(running, slo) + _before(waiting, slo, besides=slo.name)),
            {tenant: token_s * count for (_, name, tenant), count in waiting.items() if name == slo.name},
        )
        for slo in config.classes
    }
    return Load(token_s, classes)


class Demand(NamedTuple):
    """What an engine is asked for, as of its last step."""

    slots: float
    """Sequences that run or wait, as a share of those that keep their class's pace; of the class where that is most."""
    num_open: Mapping[str, int]
    """Class to sequences that run or wait."""


def measure_demand(scheduler: Scheduler) -> Demand:
    """The demand as of the last step. O(sequences)."""
    residency = scheduler.residency
    # Of copies: the engine's thread goes on meanwhile.
    num_open = Counter(seq.slo.name for seq in [*residency.running, *residency.waiting])
    slots = 0.0
    for slo in scheduler.config.classes:
        # Those that are less urgent leave it its pace.
        count = sum(num_open[other.name] for other in scheduler.config.classes if other.priority <= slo.priority)
        slots = max(slots, count / scheduler.planner.paces[slo.name].cap)
    return Demand(slots, num_open)


def _num_ahead(scheduler: Scheduler, slo: SloClass) -> int:
    """Running sequences that yield no slot to this class."""
    running = scheduler.residency.running
    return begin_of_level(running, slo.priority + 1) if scheduler.config.paced else len(running)


def _before(unread: Counter[tuple[int, str, str]], slo: SloClass, besides: str | None = None) -> int:
    """Tokens of what is as urgent as a class, of another class than `besides`."""
    return sum(count for (level, name, _), count in unread.items() if level <= slo.priority and name != besides)


def _unread(line: Iterable[Sequence]) -> Counter[tuple[int, str, str]]:
    """Level, class and tenant to prompt tokens that are to be read."""
    unread: Counter[tuple[int, str, str]] = Counter()
    for seq in line:
        if seq.due_s is None:
            unread[seq.key.level, *seq.group] += max(seq.prompt_len - seq.num_computed, 0)
    return unread
