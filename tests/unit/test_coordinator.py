from fakes import NORMAL, InlineDrafter, make_request
from msgspec.structs import replace

from tailserve.engine.cost import StepTimes
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
    coordinator, _, _ = make()
    plain, drafted = running(1, [1, 2, 3]), running(2, [1, 2, 3])
    plain.slo = replace(plain.slo, speculation="off")
    assert coordinator.wants_states([])
    assert coordinator.wants_states([plain, drafted])
    assert not coordinator.wants_states([plain])


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
    assert drafter.waits == [0.5, 0.0, 0.0, 0.0]
    assert len(drafter.sent) == 1
    assert stats.draft_timeouts == 1
    drafter.mute = False
    assert coordinator.collect([])[1].base_len == 3
    for step in range(9, 12):
        coordinator.start(step, [seq])
    assert coordinator.collect([])
    assert drafter.waits[-1] == 0.5


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
