"""Tokens past Ray, between two processes of a node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tailserve.deployments import streams
from tailserve.deployments.streams import Outboxes, StepMessage
from tailserve.deployments.tokens import TokenInlet, TokenOutlets
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import FinishReason, TokenChunk


class Ingress:
    """What came, from whom."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.inlet = TokenInlet(self._take)

    def _take(self, instance: str, data: bytes) -> None:
        if data == b"wrong":
            raise ValueError("no message")
        self.taken.append((instance, data))

    async def until(self, count: int) -> list[tuple[str, bytes]]:
        async with asyncio.timeout(5):
            while len(self.taken) < count:
                await asyncio.sleep(0.001)
        return self.taken


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    ingress = Ingress()
    yield ingress
    ingress.inlet.close()


async def test_all_messages_of_all_instances_come_in_order(ingress: Ingress, caplog: pytest.LogCaptureFixture) -> None:
    instances = [TokenOutlets(name) for name in ("a", "b")]
    for outlets in instances:
        outlets.connect("some", ingress.inlet.address)
    sent = [str(number).encode() for number in range(2000)]
    for data in sent:
        assert all(outlets.send("some", data) for outlets in instances)
    taken = await ingress.until(4000)
    assert [[data for name, data in taken if name == instance] for instance in ("a", "b")] == [sent, sent]
    instances[0].send("some", b"wrong")
    instances[0].send("some", b"right")
    assert (await ingress.until(4001))[-1] == ("a", b"right")
    assert "could not be read" in caplog.text
    for outlets in instances:
        outlets.close()


async def test_nothing_is_sent_to_who_does_not_listen_here(ingress: Ingress, tmp_path: Path) -> None:
    outlets = TokenOutlets("a")
    (tmp_path / "dead").touch()
    for number, address in enumerate(("", str(tmp_path / "elsewhere"), str(tmp_path / "dead"))):
        outlets.connect(str(number), address)
        assert not outlets.send(str(number), b"data")
    outlets.connect("here", ingress.inlet.address)
    outlets.keep({"other"})
    assert not outlets.send("here", b"data")
    outlets.connect("here", ingress.inlet.address)
    assert outlets.send("here", b"again")
    assert await ingress.until(1) == [("a", b"again")]
    outlets.close()


async def test_the_stream_of_an_ingress_on_the_node_says_that_the_router_lives(
    ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LINGER_S", 0.02)
    monkeypatch.setattr(streams, "BEAT_S", 0.05)
    boxes = Outboxes("a")
    boxes.connect("some", ingress.inlet.address)
    load = InstanceLoad(0, {}, 0.001)
    boxes.open_request("some")
    read = boxes.read("some")
    boxes.publish({"some": [TokenChunk("1", (1,))]}, load)
    assert await asyncio.wait_for(anext(read), 5) == b""
    boxes.publish({"some": [TokenChunk("1", (2,), finish_reason=FinishReason.LENGTH)]}, load)
    assert {data async for data in read} <= {b""}
    messages = [msgspec.msgpack.decode(data, type=StepMessage) for _, data in await ingress.until(2)]
    assert [message.chunks[0].token_ids for message in messages] == [(1,), (2,)]
    boxes.close()
