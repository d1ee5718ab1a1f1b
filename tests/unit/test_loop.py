from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fakes import NORMAL, FakeExecutor, engine_config, make_request
from msgspec.structs import replace

from tailserve.deployments.loop import EngineLoop
from tailserve.engine.cost import StepTimes
from tailserve.engine.engine import Engine
from tailserve.engine.errors import InvalidRequestError, NotReadyError, QueueFullError
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import Batch, FinishReason, TokenChunk


class Gate(FakeExecutor):
    """Runs a step when the test says so."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.go = threading.Semaphore(0)
        self.entered = threading.Event()
        self.broken = False

    def submit(self, batch: Batch) -> None:
        self.entered.set()
        assert self.go.acquire(timeout=10)
        if self.broken:
            raise ValueError("a bug")
        super().submit(batch)


class Harness:
    def __init__(self) -> None:
        config = engine_config(classes=(replace(NORMAL, max_queued=2),), max_num_seqs=2)
        self.executor = Gate(config)
        self.ends: dict[str, TokenChunk] = {}
        self.loop = EngineLoop(Engine(config, self.executor), config.classes, self.publish)

    def publish(self, by_ingress: Mapping[str, list[TokenChunk]], load: InstanceLoad) -> None:
        for chunk in (chunk for chunks in by_ingress.values() for chunk in chunks):
            if chunk.finish_reason is not None:
                assert chunk.request_id not in self.ends
                self.ends[chunk.request_id] = chunk

    def submit(self, name: str, **fields: Any) -> None:
        self.loop.submit(make_request([1, 2], id=name, **fields), "ingress")


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.executor.go.release(1000)
    harness.loop.stop()


def test_as_many_wait_as_max_queued_says_besides_those_that_find_a_slot(harness: Harness) -> None:
    for name in "abcd":
        harness.submit(name)
    with pytest.raises(QueueFullError, match="class 'normal' is full; come back in"):
        harness.submit("e")
    harness.executor.go.release(1000)
    assert harness.loop.wait_idle(10)
    assert set(harness.ends) == set("abcd")


def test_what_a_step_took_is_learnt_when_its_tokens_are_on_their_way(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    publish = harness.publish

    def note_and_publish(by_ingress: Mapping[str, list[TokenChunk]], load: InstanceLoad) -> None:
        if by_ingress:
            events.append("published")
        publish(by_ingress, load)

    monkeypatch.setattr(harness.loop, "_publish", note_and_publish)
    monkeypatch.setattr(StepTimes, "observe", lambda *_, **__: events.append("learnt"))
    harness.submit("a")
    harness.executor.go.release(1000)
    assert harness.loop.wait_idle(10)
    assert len(events) >= 4
    assert events[:-1:2] == ["published"] * (len(events) // 2)
    assert events[1::2] == ["learnt"] * (len(events) // 2)


def test_whatever_happens_to_the_engine_every_request_ends(harness: Harness) -> None:
    harness.submit("running")
    assert harness.executor.entered.wait(10)
    harness.submit("in the inbox")
    harness.executor.broken = True
    harness.executor.go.release()
    harness.loop.stop()
    assert {name: chunk.finish_reason for name, chunk in harness.ends.items()} == {
        "running": FinishReason.LOST,
        "in the inbox": FinishReason.LOST,
    }
    assert isinstance(harness.loop.failure, ValueError)
    with pytest.raises(NotReadyError):
        harness.submit("late")


def test_an_abort_never_overtakes_its_request(harness: Harness) -> None:
    harness.submit("a")
    assert harness.executor.entered.wait(10)
    harness.submit("b")
    harness.loop.abort(["b", "unknown"])
    harness.executor.go.release(1000)
    assert harness.loop.wait_idle(10)
    assert harness.ends["b"].finish_reason is FinishReason.ABORT
    assert harness.ends["a"].finish_reason is FinishReason.LENGTH


def test_an_ingress_that_is_gone_takes_its_requests_along(harness: Harness) -> None:
    harness.submit("a", max_tokens=30)
    harness.loop.abort_ingress("ingress")
    harness.executor.go.release(1000)
    assert harness.loop.wait_idle(10)
    assert harness.ends["a"].finish_reason is FinishReason.ABORT


def test_ids_and_classes_are_checked(harness: Harness) -> None:
    harness.submit("a")
    with pytest.raises(InvalidRequestError, match="already in use"):
        harness.submit("a")
    with pytest.raises(InvalidRequestError, match="unknown SLO class"):
        harness.submit("b", slo_class="gold")


def test_a_dead_executor_is_restarted_without_a_request(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    restarted = threading.Event()
    restart = harness.executor.restart
    harness.executor.restart = lambda: (restart(), restarted.set())  # type: ignore[method-assign, assignment]
    harness.executor.lost = True
    assert restarted.wait(10)


def test_whoever_asks_for_a_session_to_be_dropped_may_leave(harness: Harness) -> None:
    harness.submit("running")
    assert harness.executor.entered.wait(10)
    assert harness.loop.drop_session("", "s").cancel()
    asked = harness.loop.drop_session("", "s")
    harness.executor.go.release(1000)
    assert asked.result(10) == 0
    assert harness.loop.wait_idle(10)
    assert harness.loop.failure is None


def test_a_session_to_be_dropped_is_answered_when_the_engine_stops(harness: Harness) -> None:
    harness.submit("running")
    assert harness.executor.entered.wait(10)
    asked = harness.loop.drop_session("", "s")
    harness.executor.broken = True
    harness.executor.go.release(1000)
    assert asked.result(10) == 0


def test_what_autoscaling_goes_by_is_true_while_nothing_happens(harness: Harness) -> None:
    harness.submit("a")
    assert harness.executor.entered.wait(10)
    busy = harness.loop.report()
    harness.executor.go.release(1000)
    assert harness.loop.wait_idle(10)
    idle = harness.loop.report()
    assert busy["slots"] > 0
    assert busy["open:normal"] == 1
    assert idle["slots"] == idle["kv"] == idle["lateness:normal"] == 0.0
