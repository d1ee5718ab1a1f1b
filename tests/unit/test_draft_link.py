"""The router's link to a draft process, with a process that a test can kill, mute and bring back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tailserve.deployments import draft
from tailserve.deployments.draft import DraftLink, DraftOptions
from tailserve.deployments.sockets import Sockets
from tailserve.engine.speculation.drafter import DraftResult, DraftWork


class FakeChannel:
    def __init__(self) -> None:
        self.answers: list[DraftResult] = []
        self.mute = False

    def send(self, work: DraftWork) -> bool:
        self.answers.append(DraftResult(work.number, {}))
        return True

    def receive(self, timeout_s: float) -> DraftResult | None:
        return None if self.mute or not self.answers else self.answers.pop(0)


class FakeProcess:
    def __init__(self) -> None:
        self.starts = 0
        self.failures = 0
        self.ended = False
        self.started = threading.Event()

    def start(self) -> None:
        self.starts += 1
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no room")
        self.channel, self.ended = FakeChannel(), False
        self.started.set()

    def kill(self) -> None:
        self.channel, self.ended = None, True


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DraftLink:
    monkeypatch.setattr(draft, "RETRY_S", 0.01)
    link = DraftLink(DraftOptions(), sockets=Sockets(tmp_path), actor_options={}, load_timeout_s=1.0, hang_s=0.05)
    link.process = FakeProcess()  # type: ignore[assignment]
    link.start()
    link.process.started.clear()  # type: ignore[attr-defined]
    return link


def work(number: int) -> DraftWork:
    return DraftWork(number, 0, [], [])


def comes_back(link: DraftLink) -> None:
    assert link.process.started.wait(10)  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while not link.send(work(9)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert link.receive(9, 1.0) is not None


def test_a_draft_that_dies_is_brought_back_and_known_to_be_new(link: DraftLink) -> None:
    before = link.incarnation
    link.process.ended = True  # type: ignore[misc]
    assert not link.send(work(1))
    assert link.receive(1, 0.0) is None
    comes_back(link)
    assert link.incarnation > before


def test_a_draft_that_hangs_is_replaced(link: DraftLink) -> None:
    link.process.channel.mute = True  # type: ignore[union-attr]
    assert link.send(work(1))
    assert link.receive(1, 0.0) is None
    time.sleep(0.06)
    assert link.receive(1, 0.0) is None
    comes_back(link)


def test_an_idle_draft_is_not_taken_for_a_hanging_one(link: DraftLink) -> None:
    assert link.send(work(1))
    time.sleep(0.06)
    assert link.receive(1, 0.0) == DraftResult(1, {})
    assert link.process.starts == 1  # type: ignore[attr-defined]


def test_answers_to_earlier_steps_are_skipped(link: DraftLink) -> None:
    link.send(work(1))
    link.send(work(2))
    assert link.receive(2, 1.0) == DraftResult(2, {})


def test_attempts_go_on_until_one_succeeds(link: DraftLink) -> None:
    link.process.failures = 2  # type: ignore[attr-defined]
    link.process.ended = True  # type: ignore[misc]
    assert not link.send(work(1))
    comes_back(link)
    assert link.process.starts == 4  # type: ignore[attr-defined]
