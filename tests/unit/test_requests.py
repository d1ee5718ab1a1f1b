"""Requests past Ray, between two processes of a node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tailserve.deployments import requests
from tailserve.deployments.requests import RequestInlet, RequestOutlets
from tailserve.deployments.unanswered import SILENT_S, Unanswered
from tailserve.engine.errors import InvalidRequestError, NotReadyError, QueueFullError, TailserveError


class Router:
    """What came, and what is said of it."""

    def __init__(self, path: Path) -> None:
        self.taken: list[tuple[bytes, str, str]] = []
        self.refusals: dict[bytes, TailserveError] = {}
        self.inlet = RequestInlet(path, self._accept)

    def _accept(self, request: bytes, ingress: str, tokens_at: str) -> TailserveError | None:
        if request == b"wrong":
            raise ValueError("no request")
        self.taken.append((request, ingress, tokens_at))
        return self.refusals.get(request)


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[Router]:
    router = Router(tmp_path / "requests")
    await router.inlet.open()
    yield router
    router.inlet.close()


@pytest.fixture
async def outlets(router: Router) -> AsyncIterator[RequestOutlets]:
    outlets = RequestOutlets()
    await outlets.connect("a", router.inlet.address)
    yield outlets
    outlets.close()


async def test_requests_of_any_size_arrive_in_order(router: Router, outlets: RequestOutlets) -> None:
    sent = [bytes([number]) * 10**number for number in range(7)] * 3
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*(outlets.submit("a", data, "some", "there") for data in sent))
    assert answers == [None] * len(sent)
    assert router.taken == [(data, "some", "there") for data in sent]


async def test_refusals_come_as_they_were(router: Router, outlets: RequestOutlets) -> None:
    refusals: list[TailserveError] = [
        QueueFullError("full", retry_after_s=2.5, param="slo_class"),
        InvalidRequestError("in use", param="request_id", code="taken"),
        NotReadyError("going", retry_after_s=1.0),
    ]
    for refusal in refusals:
        router.refusals[b"data"] = refusal
        came = await outlets.submit("a", b"data", "some", "")
        assert type(came) is type(refusal)
        assert str(came) == str(refusal)
        assert came.code == refusal.code
        assert vars(came) == vars(refusal)


async def test_who_waits_for_a_router_that_goes_is_told(
    router: Router, outlets: RequestOutlets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await outlets.submit("a", b"data", "some", "") is None
    monkeypatch.setattr(requests._Messages, "send", lambda end, message: None)
    waits = asyncio.create_task(outlets.submit("a", b"data", "some", ""))
    await asyncio.sleep(0)
    router.inlet.close()
    async with asyncio.timeout(5):
        assert isinstance(await waits, NotReadyError)
    assert not outlets.reach("a")


async def test_a_request_that_cannot_be_taken_in_is_alone_in_that(
    outlets: RequestOutlets, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*(outlets.submit("a", data, "some", "") for data in (b"right", b"wrong", b"right")))
    assert [type(answer) for answer in answers] == [type(None), NotReadyError, type(None)]
    assert "could not be taken in" in caplog.text


async def test_the_answer_to_one_who_has_left_is_nobody_else_s(router: Router, outlets: RequestOutlets) -> None:
    router.refusals[b"first"] = NotReadyError("first")
    left, second = (asyncio.create_task(outlets.submit("a", data, "some", "")) for data in (b"first", b"second"))
    await asyncio.sleep(0)
    left.cancel()
    async with asyncio.timeout(5):
        assert await second is None
    assert [request for request, _, _ in router.taken] == [b"first", b"second"]


async def test_what_is_no_message_ends_its_connection(router: Router, outlets: RequestOutlets) -> None:
    reader, writer = await asyncio.open_unix_connection(router.inlet.address)
    writer.write(b"\x01\x00\x00\x00\xc1")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    assert await outlets.submit("a", b"data", "some", "") is None


async def test_who_stops_waiting_for_a_connection_leaves_nothing(
    router: Router, outlets: RequestOutlets, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", never)
    connecting = asyncio.create_task(outlets.connect("b", router.inlet.address))
    await asyncio.sleep(0)
    connecting.cancel()
    await asyncio.wait([connecting])
    monkeypatch.undo()
    await outlets.connect("b", router.inlet.address)
    assert outlets.reach("b")


def test_instances_that_owe_an_answer_are_silent() -> None:
    now = 0.0
    unanswered = Unanswered(lambda: now)
    with unanswered.asking("a"), unanswered.asking(None):
        now = SILENT_S
        with unanswered.asking("b"):
            assert unanswered.silent() == set()
            now += 0.1
            assert unanswered.silent() == {"a"}
    now += SILENT_S
    assert unanswered.silent() == set()


async def test_only_those_of_this_node_are_reached(router: Router, tmp_path: Path) -> None:
    outlets = RequestOutlets()
    (tmp_path / "dead").touch()
    for name in ("elsewhere", "dead"):
        await outlets.connect(name, str(tmp_path / name))
        assert not outlets.reach(name)
    # Two at once, as two first requests would.
    await asyncio.gather(*(outlets.connect("a", router.inlet.address) for _ in range(2)))
    assert outlets.reach("a")
    assert len(router.inlet._ends) == 1
    assert await outlets.submit("a", b"data", "some", "") is None
    outlets.close()
