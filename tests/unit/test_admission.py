"""Who may enter, and whether what the others are told is true."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from fakes import NORMAL, make_request
from msgspec.structs import replace

from tailserve.engine.admission import Admission
from tailserve.engine.load import ClassLoad, Load
from tailserve.engine.types import Request, SloClass

QUICK = SloClass(name="quick", priority=0, ttft_s=1.0, tpot_s=0.1, admission="reject")


class Desk:
    """A queue that is served at a steady rate, and its admission."""

    def __init__(self, slo: SloClass, *, rate: float, token_s: float = 0.0, free_slots: int = 0) -> None:
        self.admission = Admission((slo,))
        self.name = slo.name
        self.rate, self.token_s, self.free_slots = rate, token_s, free_slots
        self.now, self.started, self._owed = 0.0, 0, 0.0
        self.queue: deque[Request] = deque()
        self.note()

    def note(self) -> None:
        queued = Counter(request.tenant for request in self.queue)
        waiting: Counter[str] = Counter()
        for request in self.queue:
            waiting[request.tenant] += len(request.prompt_token_ids)
        waiting_s = {tenant: self.token_s * count for tenant, count in waiting.items()}
        load = Load(self.token_s, {self.name: ClassLoad(self.free_slots, queued, self.started, 0.0, waiting_s)})
        self.admission.note(load, self.now)

    def run_until(self, moment: float) -> None:
        while self.now < moment:
            self.now += 0.1
            self._owed = min(self._owed + 0.1 * self.rate, len(self.queue))
            while self._owed >= 1:
                self._owed -= 1
                self.queue.popleft()
                self.started += 1
            self.note()

    def ask(self, request: Request) -> float | None:
        wait = self.admission.ask(request, self.now)
        if wait is None:
            self.queue.append(request)
        return wait


_numbers = iter(range(1, 1 << 30))


def fresh(**fields: object) -> Request:
    return make_request([next(_numbers)] * int(fields.pop("length", 3)), **({"slo_class": "normal"} | fields))  # type: ignore[arg-type]


def test_who_comes_back_when_told_is_admitted() -> None:
    """Three times as many as are served, of which everybody that is refused comes back."""
    chance = random.Random(1)
    desk = Desk(replace(NORMAL, max_queued=10), rate=2.0)
    returns: list[tuple[float, Request, float]] = []
    told, admitted, came_back, due = [], 0, 0, 0.0
    while due < 120:
        due += chance.expovariate(6.0)
        events = sorted([*(entry for entry in returns if entry[0] <= due), (due, fresh(), 0.0)], key=lambda e: e[0])
        returns = [entry for entry in returns if entry[0] > due]
        for moment, request, wait in events:
            desk.run_until(moment)
            answer = desk.ask(request)
            if wait:
                came_back += 1
                admitted += answer is None
            if answer is not None and not wait and len(told) < 400:
                told.append(answer)
                returns.append((desk.now + answer, request, answer))
        assert len(desk.queue) <= 12
    assert came_back > 50
    assert admitted / came_back >= 0.95
    # Six a second come and two are served: the line of those that are to come back grows.
    assert max(told) > 20


def test_early_birds_are_sent_away_again_and_keep_their_place() -> None:
    desk = Desk(replace(NORMAL, max_queued=1), rate=1.0)
    assert desk.ask(fresh()) is None
    request = fresh()
    first = desk.ask(request)
    assert first is not None
    again = desk.ask(request)
    assert again is not None
    assert again <= first
    stranger = desk.ask(fresh())
    assert stranger is not None
    assert stranger > first, "the place of the first is taken"
    desk.run_until(desk.now + first)
    assert desk.ask(request) is None


def test_a_place_is_not_kept_for_ever() -> None:
    desk = Desk(replace(NORMAL, max_queued=1), rate=1.0)
    assert desk.ask(fresh()) is None
    for _ in range(5):
        assert desk.ask(fresh()) is not None
    desk.run_until(60.0)
    assert desk.ask(fresh()) is None


def test_places_of_those_that_gave_up_keep_nobody_out_of_an_idle_server() -> None:
    desk = Desk(replace(NORMAL, max_queued=10), rate=5.0)
    for _ in range(210):
        desk.ask(fresh(tenant="gone"))
    desk.run_until(10.0)
    assert not desk.queue
    assert [desk.ask(fresh(tenant=name)) for name in ("gone", "new")] == [None, None]


def test_a_class_may_refuse_what_would_be_late() -> None:
    desk = Desk(QUICK, rate=5.0, token_s=0.001, free_slots=100)
    # A prompt of 300 tokens takes 0.3 s: the fourth would be late.
    waits = [desk.ask(fresh(length=300, slo_class="quick")) for _ in range(5)]
    assert waits[:3] == [None] * 3
    assert waits[3] == pytest.approx(0.2)
    assert waits[4] == pytest.approx(0.5)


def test_one_tenants_queue_does_not_keep_others_out() -> None:
    desk = Desk(replace(NORMAL, max_queued=10), rate=1.0)
    for _ in range(20):
        desk.ask(fresh(tenant="loud"))
    assert len(desk.queue) == 10
    desk.note()
    assert [desk.ask(fresh(tenant="quiet")) for _ in range(5)] == [None] * 5
    assert desk.ask(fresh(tenant="quiet")) is not None


def test_what_one_tenant_has_in_line_is_not_what_another_waits_for() -> None:
    desk = Desk(QUICK, rate=5.0, token_s=0.001, free_slots=100)
    waits = [desk.ask(fresh(length=300, slo_class="quick", tenant="loud")) for _ in range(5)]
    assert waits[:3] == [None] * 3
    desk.note()
    # They take turns: its first has none of them before it, its second one.
    for _ in range(2):
        assert desk.ask(fresh(length=300, slo_class="quick", tenant="quiet")) is None
        desk.note()
    assert desk.ask(fresh(length=300, slo_class="quick", tenant="loud")) is not None


def test_what_another_instance_had_accepted_is_not_refused() -> None:
    desk = Desk(replace(NORMAL, max_queued=1), rate=1.0)
    assert desk.ask(fresh()) is None
    assert desk.ask(fresh()) is not None
    assert desk.ask(fresh(carried=())) is None
