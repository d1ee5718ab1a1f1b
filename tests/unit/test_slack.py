"""Scheduling by slack, on an engine whose steps take 10 ms and 1 ms a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from fakes import TimedExecutor, engine_config, make_request

from tailserve.engine.engine import Engine
from tailserve.engine.types import Request, SloClass

BASE, PER_TOKEN = 0.010, 0.001
CRITICAL = SloClass(name="critical", priority=0, ttft_s=0.5, tpot_s=0.04, speculation="off")
NORMAL = SloClass(name="normal", priority=10, ttft_s=5.0, tpot_s=0.2, speculation="off")


class Run:
    """An engine, and when each of its requests got its tokens."""

    def __init__(self, **config: object) -> None:
        sizes: dict[str, object] = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 1024}
        sizes |= {"num_blocks": 8192, "block_size": 8, "classes": (CRITICAL, NORMAL)}
        settings = engine_config(**(sizes | config))
        self.executor = TimedExecutor(settings, BASE, PER_TOKEN)
        profile = tuple((size, BASE + PER_TOKEN * size) for size in (1, 8, 64, 128))
        self.engine = Engine(
            engine_config(**(sizes | config), step_profile=profile), self.executor, clock=lambda: self.executor.now
        )
        self.arrivals: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}

    @property
    def now(self) -> float:
        return self.executor.now

    def add(self, slo_class: str, num_prompt: int, num_output: int, **fields: object) -> Request:
        request = make_request([1] * num_prompt, max_tokens=num_output, slo_class=slo_class, **fields)
        self.arrivals[request.id] = self.now
        self.times[request.id] = []
        self.engine.add(request)
        return request

    def run(self, until: Callable[[], bool] | None = None) -> None:
        while self.engine.has_work and not (until and until()):
            for chunk in self.engine.step():
                self.times[chunk.request_id] += [self.now] * len(chunk.token_ids)

    def ttft(self, request: Request) -> float:
        return self.times[request.id][0] - self.arrivals[request.id]

    def tpot(self, request: Request) -> float:
        times = self.times[request.id]
        return (times[-1] - times[0]) / (len(times) - 1)

    def gaps(self, request: Request) -> list[float]:
        times = self.times[request.id]
        return [after - before for before, after in pairwise(times)]


def add_all(run: Run, slo_class: str, count: int, num_prompt: int, num_output: int) -> list[Request]:
    return [run.add(slo_class, num_prompt, num_output) for _ in range(count)]


def generating(run: Run, requests: Iterable[Request]) -> Callable[[], bool]:
    return lambda: all(run.times[request.id] for request in requests)


@pytest.mark.parametrize("policy", ["slack", "priority"])
def test_a_critical_request_keeps_its_pace_beside_many_others(policy: str) -> None:
    run = Run(scheduling_policy=policy)
    normal = add_all(run, "normal", 60, 4, 120)
    run.run(generating(run, normal))
    critical = run.add("critical", 60, 40)
    run.run(lambda: len(run.times[critical.id]) == 40)
    kept = run.ttft(critical) <= 0.5 and run.tpot(critical) <= 0.04
    assert kept == (policy == "slack"), f"first after {run.ttft(critical):.3f} s, {run.tpot(critical):.4f} s a token"
    if policy == "slack":
        assert all(max(run.gaps(request)) < 0.5 for request in normal), "somebody was left out for long"
    run.run()
    assert all(len(run.times[request.id]) == 120 for request in normal)


def test_a_critical_request_gets_its_first_token_in_time_while_long_prompts_are_read() -> None:
    run = Run()
    add_all(run, "normal", 8, 900, 4)
    run.run(lambda: run.now > 0.3)
    critical = run.add("critical", 100, 10)
    run.run()
    # 125 ms at most until the step that runs has ended, 110 for its own prompt.
    assert run.ttft(critical) < 0.3


def test_prompts_of_guarded_classes_are_read_though_others_generate_at_the_limit_of_their_pace() -> None:
    run = Run()
    first = add_all(run, "critical", 25, 4, 100)
    run.run(generating(run, first))
    second = run.add("critical", 100, 10)
    run.run(generating(run, [second]))
    assert run.ttft(second) < 0.5


def test_a_sequence_is_no_further_ahead_of_its_pace_than_a_few_tokens() -> None:
    run = Run()
    critical = run.add("critical", 4, 200)
    run.run(lambda: len(run.times[critical.id]) == 100)
    add_all(run, "normal", 60, 40, 20)
    run.run()
    # A second of tokens made early buys two long steps, no more.
    assert sum(gap > 0.045 for gap in run.gaps(critical)) <= 3


def test_no_step_is_so_long_that_somebody_who_arrives_could_not_be_in_time() -> None:
    run = Run()
    add_all(run, "normal", 4, 900, 2)
    run.run()
    assert max(sum(batch.lengths) for batch in run.executor.batches) * PER_TOKEN + BASE <= 0.125 + 1e-9


def test_fewer_run_when_a_class_falls_behind_its_pace_and_more_when_it_does_not() -> None:
    tight = SloClass(name="normal", priority=10, ttft_s=50.0, tpot_s=0.05, speculation="off")
    run = Run(classes=(CRITICAL, tight))
    add_all(run, "normal", 60, 4, 400)
    caps = []

    def note() -> bool:
        caps.append((run.now, run.engine.paces()["normal"].cap, run.engine.gauges().num_running))
        return False

    run.run(note)
    # A step of 40 takes 50 ms.
    assert max(running for _, _, running in caps) <= 40
    assert all(run.tpot(request) <= 0.055 for request in map(_named, run.times))


def _named(request_id: str) -> Request:
    return make_request([1], id=request_id)


def test_a_busy_machine_lowers_the_cap_within_two_seconds_and_an_idle_one_raises_it_again() -> None:
    tight = SloClass(name="normal", priority=10, ttft_s=500.0, tpot_s=0.05, speculation="off")
    run = Run(classes=(CRITICAL, tight))
    add_all(run, "normal", 64, 4, 500)
    run.run(lambda: run.now > 2.0)
    before = run.engine.paces()["normal"].cap
    run.executor._cost = (2 * BASE, 2 * PER_TOKEN)
    run.run(lambda: run.now > 4.0)
    busy = run.engine.paces()["normal"].cap
    run.executor._cost = (BASE, PER_TOKEN)
    run.run(lambda: run.now > 10.0)
    after = run.engine.paces()["normal"].cap
    assert busy < 0.6 * before
    assert after > 0.8 * before


def test_what_cannot_be_in_time_goes_behind_what_can() -> None:
    short = SloClass(name="normal", priority=10, ttft_s=1.0, tpot_s=0.2, speculation="off")
    run = Run(classes=(CRITICAL, short), max_num_seqs=2)
    first = add_all(run, "normal", 6, 100, 60)
    run.run(lambda: run.now > 1.5)
    fresh = run.add("normal", 100, 10)
    run.run(generating(run, [fresh]))
    waiting = [request for request in first if not run.times[request.id]]
    assert waiting, "the test wants a queue"
    assert run.ttft(fresh) <= 1.5
    run.run()
    assert all(len(run.times[request.id]) == 60 for request in first)


def test_nobody_waits_for_ever() -> None:
    """Critical requests for everything there is, and a normal one that has an age to be served at."""
    run = Run(max_wait_s=3.0, max_num_seqs=4)
    normal = run.add("normal", 100, 20)

    def keep_busy() -> bool:
        while sum(not run.times[name] or len(run.times[name]) < 30 for name in run.times if name != normal.id) < 60:
            run.add("critical", 50, 30)
        return len(run.times[normal.id]) == 20 or run.now > 60

    run.run(keep_busy)
    assert run.times[normal.id], "starved"
    assert run.ttft(normal) < 5
    assert max(run.gaps(normal)) < 1
