"""Whether a request may enter, and when to come back if not."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import NamedTuple

from tailserve.engine.load import ClassLoad, Load
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import Request, SloClass

RATE_S = 10.0
"""How far back the rate goes at which a class's requests leave the queue."""
GRACE = 0.5
"""Of the wait that a client was told, and `GRACE_S` at least: for how long its place is kept after that."""
GRACE_S = 5.0
EARLY_S = 0.25
"""How much too early a client may be back."""
SWEEP_S = 1.0
LONGEST_WAIT_S = 600.0
MOST_KEPT = 4096
"""Places of a class; who is refused beyond them is told a time, and must take a chance."""


class _Place(NamedTuple):
    tenant: str
    due: float
    until: float


class _Line:
    """One class's queue, as admission sees it."""

    def __init__(self, slo: SloClass) -> None:
        self.slo = slo
        self.load = ClassLoad(0, Counter(), 0, 0.0, {})
        self.entered: Counter[str] = Counter()
        """Tenant to requests in the inbox and in the queue."""
        self.new = 0
        """Requests in the inbox."""
        self.kept: dict[int, _Place] = {}
        """Hash of a refused request to the place that is kept for it."""
        self._swept_s = float("-inf")
        self._starts: deque[tuple[float, int]] = deque()

    def note(self, load: ClassLoad, now: float) -> None:
        self.load = load
        self.entered = load.queued
        self.new = 0
        self._starts.append((now, load.num_started))
        while self._starts[0][0] < now - RATE_S and len(self._starts) > 1:
            self._starts.popleft()

    @property
    def num_queued(self) -> int:
        """Those in the inbox included."""
        return self.entered.total()

    def enter(self, request: Request) -> None:
        self.entered[request.tenant] += 1
        self.new += 1

    def forget(self, now: float) -> None:
        """Gives up the places of those that did not come."""
        if now >= self._swept_s + SWEEP_S:
            self._swept_s = now
            self.kept = {key: place for key, place in self.kept.items() if place.until > now}

    def due(self, now: float) -> Counter[str]:
        """Tenant to its places for which somebody is to come before a request that enters now has left the queue."""
        horizon = now + (self.num_queued / self.rate(now) if self.num_queued else 0.0)
        return Counter(place.tenant for place in self.kept.values() if now < place.until and place.due <= horizon)

    def rate(self, now: float) -> float:
        """Requests a second that left the queue lately; at least one in `RATE_S`."""
        then, count = self._starts[0] if self._starts else (now, 0)
        return max(self.load.num_started - count, 1) / max(now - then, 1.0)


class Admission:
    """Decides at the edge of an instance; not thread-safe.

    A class's queue holds `max_queued` requests beyond those that find a slot. With `admission: reject` it holds no more than
    can have their first token in time. Whoever is refused is told when there will be a place, no two the same one, and the
    place is kept: a request that comes again is known by its content. No tenant's requests keep another's out while that
    one has less than its share of the queue. What another instance had accepted is not refused.
    """

    def __init__(self, classes: tuple[SloClass, ...]) -> None:
        self._lines = {slo.name: _Line(slo) for slo in classes}
        self._load = Load(0.0, {})

    def note(self, load: Load, now: float) -> None:
        """The inbox is empty, and this is how things are."""
        self._load = load
        for name, line in self._lines.items():
            line.note(load.classes[name], now)

    def ask(self, request: Request, now: float) -> float | None:
        """None if the request may enter, and it counts then; else seconds after which there is a place for it."""
        line = self._lines[request.slo_class]
        line.forget(now)
        if request.carried is not None:
            line.enter(request)
            return None
        key = hash((request.tenant, request.prompt_token_ids, request.sampling.max_tokens))
        place = line.kept.get(key)
        wait = max(place.due - now - EARLY_S, 0.0) if place else self._wait(line, request, now)
        if wait > 0:
            if place is None and len(line.kept) < MOST_KEPT:
                wait = min(wait, LONGEST_WAIT_S)
                line.kept[key] = _Place(request.tenant, now + wait, now + wait + max(GRACE * wait, GRACE_S))
            return wait
        line.kept.pop(key, None)
        line.enter(request)
        return None

    def _wait(self, line: _Line, request: Request, now: float) -> float:
        slo = line.slo
        places = slo.max_queued + max(line.load.free_slots - self._num_before(line), 0)
        ahead = line.num_queued + line.due(now).total()
        tenants = {*line.entered, *(place.tenant for place in line.kept.values()), request.tenant}
        share = places // len(tenants)
        if ahead >= places and (len(tenants) == 1 or line.entered[request.tenant] >= share):
            return (line.num_queued + len(line.kept) - places + 1) / line.rate(now)
        if slo.admission == "reject":
            needed = self._first_token_s(line, len(request.prompt_token_ids), now, request.tenant)
            return request.age_s + needed - slo.ttft_s
        return 0.0

    def _num_before(self, line: _Line) -> int:
        """Requests of other classes that get their slots first."""
        others = (other for other in self._lines.values() if other is not line)
        return sum(other.num_queued for other in others if other.slo.priority <= line.slo.priority)

    def state(self, num_waiting: int, now: float) -> InstanceLoad:
        """What those who choose among instances go by."""
        waits = {name: self._first_token_s(line, 0, now) for name, line in self._lines.items()}
        return InstanceLoad(num_waiting, waits, self._load.token_s)

    def _first_token_s(self, line: _Line, num_tokens: int, now: float, tenant: str | None = None) -> float:
        """Seconds from now to the first token of a request of so many: the prompts before it are read, and there is a
        slot. `tenant`: whose it is, since tenants take turns; None: it comes behind all of them."""
        due = line.due(now)
        counts = line.entered + due
        most = math.inf if tenant is None else counts[tenant]
        shares = {name: min(most / count, 1.0) for name, count in counts.items()}
        before = sum(shares[name] * count for name, count in counts.items())
        behind = max(before + self._num_before(line) - line.load.free_slots + 1, 0)
        waiting_s = sum(shares.get(name, 1.0) * seconds for name, seconds in line.load.waiting_s.items())
        # How long the prompts are of those that are not in the queue yet is not known.
        new = (line.new + due.total()) * before / counts.total() if counts else 0.0
        reading_s = line.load.reading_s + waiting_s + (new + 1) * num_tokens * self._load.token_s
        return max(reading_s, behind / line.rate(now) if behind else 0.0)
