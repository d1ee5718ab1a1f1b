"""How long a verifier may think about a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tailserve.deployments import verifier
from tailserve.deployments.verifier import POLL_S, VerifierExecutor
from tailserve.engine.errors import ExecutorLostError


class Silence:
    """A channel on which nothing comes; each look at it takes as long as asked, or as the machine stands still."""

    def __init__(self) -> None:
        self.now, self.stopped_s, self.looks = 0.0, 0.0, 0

    def receive(self, timeout_s: float) -> None:
        self.looks += 1
        self.now += timeout_s + self.stopped_s
        self.stopped_s = 0.0


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Silence:
    channel = Silence()
    # The module's own name: everybody else keeps the clock.
    monkeypatch.setattr(verifier, "time", SimpleNamespace(monotonic=lambda: channel.now))
    return channel


def executor(channel: Silence) -> VerifierExecutor:
    made = object.__new__(VerifierExecutor)
    made.processes = [SimpleNamespace(channel=channel, ended=False)]  # type: ignore[list-item]
    made._waited_s, made._step_timeout_s = 0.0, 2.0
    return made


def test_a_verifier_that_does_not_answer_is_lost(silence: Silence) -> None:
    with pytest.raises(ExecutorLostError, match="within 2 s"):
        executor(silence).poll()
    assert 2.0 < silence.now < 2.0 + 2 * POLL_S


def test_time_in_which_the_router_itself_stood_still_does_not_count(silence: Silence) -> None:
    waiting = executor(silence)
    silence.stopped_s = 600.0
    assert waiting.poll(1.0) is None
    assert waiting.poll(1.0) is None
    with pytest.raises(ExecutorLostError):
        waiting.poll(2.0)
