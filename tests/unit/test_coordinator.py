import time

import pytest
from fakes import NORMAL, FakeExecutor, InlineDrafter, engine_config, make_request, run_to_end
from msgspec.structs import replace

from tailserve.engine.cost import StepTimes
from tailserve.engine.engine import Engine
from tailserve.engine.sequence import Key, Sequence
from tailserve.engine.speculation.coordinator import DraftCoordinator
from tailserve.engine.speculation.drafter import DraftResult, DraftWork
from tailserve.engine.speculation.policy import DraftPolicy
from tailserve.engine.stats import EngineStats


class Recorder(InlineDrafter):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[DraftWork] = []
        self.waits: list[float] = []

    def send(self, work: DraftWork) -> bool:
        self.sent.append(work)
        return super().send(work)

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        self.waits.append(timeout_s)
        return super().receive(number, timeout_s)


def running(row: int, tokens: list[int]) -> Sequence:
    seq = Sequence(make_request(tokens), NORMAL, 0.0, Key(10, late=False, tag=0.0, number=0), max_model_len=64)
    seq.row, seq.num_computed = row, len(tokens) - 1
    seq.num_scheduled = seq.num_computed
    return seq


def make() -> tuple[DraftCoordinator, Recorder, EngineStats]:
    drafter, stats = Recorder(), EngineStats()
    return DraftCoordinator(drafter, DraftPolicy(StepTimes()), timeout_s=0.5, stats=stats), drafter, stats


def test_only_new_tokens_are_sent() -> None:
    coordinator, drafter, _ = make()
    seq = running(1, [1, 2, 3])
    coordinator.start(0, [seq])
    coordinator.collect([])
    seq.token_ids.append(4)
    seq.num_computed += 1
    seq.num_scheduled += 1
    coordinator.start(1, [seq])
    coordinator.collect([])
    coordinator.start(2, [])
    rows = [[(row.keep, row.token_ids) for row in work.rows] for work in drafter.sent]
    assert rows == [[(0, [1, 2, 3])], [(3, [4])], []]
    assert drafter.sent[-1].leaves == [1]


def test_states_go_only_where_somebody_may_draft() -> None:
    """From the first chunk of a prompt on, whoever ran before."""
    config = engine_config(classes=(NORMAL, replace(NORMAL, name="plain", speculation="off")))
    executor = FakeExecutor(config)
    engine = Engine(config, executor, InlineDrafter())
    engine.add(make_request([1, 2, 3], id="plain", slo_class="plain", max_tokens=40))
    for _ in range(8):
        engine.step()
    assert not any(batch.states for batch in executor.batches)
    engine.add(make_request([4, 5, 6], id="drafted", max_tokens=4))
    run_to_end(engine)
    engine.add(make_request([7, 8, 9], id="first", max_tokens=4))
    run_to_end(engine)
    assert [batch.states for batch in executor.batches if batch.joins] == [False, True, True]


def test_prompts_being_read_get_no_drafts() -> None:
    coordinator, drafter, _ = make()
    seq = running(1, [1, 2, 3])
    seq.num_computed = seq.num_scheduled = 0
    coordinator.start(0, [seq])
    assert drafter.sent == []


def test_a_late_draft_is_waited_for_once() -> None:
    coordinator, drafter, stats = make()
    drafter.mute = True
    seq = running(1, [1, 2, 1])
    for step in range(4):
        coordinator.start(step, [seq])
        assert coordinator.collect([]) == {}
    assert drafter.waits == [pytest.approx(0.5, abs=0.1), 0.0, 0.0, 0.0]
    assert len(drafter.sent) == 1
    assert stats.draft_timeouts == 1
    drafter.mute = False
    assert coordinator.collect([])[1].base_len == 3
    for step in range(9, 12):
        coordinator.start(step, [seq])
    assert coordinator.collect([])
    assert drafter.waits[-1] == pytest.approx(0.5, abs=0.1)


def test_a_draft_that_is_always_late_is_asked_less_and_less() -> None:
    coordinator, drafter, stats = make()
    seq = running(1, [1, 2, 1])
    for step in range(200):
        coordinator.start(step, [seq])
        drafter.mute = True
        coordinator.collect([])
        drafter.mute = False
        coordinator.collect([])
    assert stats.draft_timeouts <= 8


def test_a_restarted_drafter_is_told_everything_again() -> None:
    coordinator, drafter, _ = make()
    seq = running(1, [1, 2, 3])
    coordinator.start(0, [seq])
    coordinator.collect([])
    drafter.dead = True
    coordinator.start(1, [seq])
    assert coordinator.collect([]) == {}
    drafter.restart()
    coordinator.start(2, [seq])
    assert drafter.sent[-1].rows[0].keep == 0


def test_a_draft_that_was_not_foreseen_has_what_is_left_of_the_time() -> None:
    class Slow(Recorder):
        def receive(self, number: int, timeout_s: float) -> DraftResult | None:
            time.sleep(0.1)
            return super().receive(number, timeout_s)

    drafter = Slow()
    coordinator = DraftCoordinator(drafter, DraftPolicy(StepTimes()), num_outcomes=4, timeout_s=0.5, stats=EngineStats())
    seq = running(1, [1, 2, 1, 2])
    coordinator.foresee(0, [seq], {1: ([], [])})
    assert coordinator.collect([seq])
    first, second = drafter.waits
    assert first > 0.4
    assert second <= 0.4
