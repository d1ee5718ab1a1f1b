import asyncio

import msgspec
import pytest

from tailserve.deployments import streams
from tailserve.deployments.streams import Outboxes, StepMessage
from tailserve.engine.errors import NotReadyError
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import FinishReason, TokenChunk

LOAD = InstanceLoad(0, {}, 0.001)


async def test_one_message_per_step_for_all_requests_of_an_ingress() -> None:
    boxes = Outboxes()
    for _ in range(3):
        boxes.open_request("a")
    boxes.publish({"a": [TokenChunk(str(n), (n,)) for n in range(3)]}, LOAD)
    boxes.publish({"a": [TokenChunk(str(n), finish_reason=FinishReason.STOP) for n in range(3)]}, LOAD)
    messages = [msgspec.msgpack.decode(data, type=StepMessage) async for data in boxes.read("a")]
    assert [len(message.chunks) for message in messages] == [3, 3]
    assert messages[0].load == LOAD


async def test_a_stream_stays_open_while_requests_are_and_a_moment_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LINGER_S", 0.02)
    boxes = Outboxes()
    boxes.open_request("a")
    reader = asyncio.create_task(_drain(boxes))
    await asyncio.sleep(0.1)
    assert not reader.done()
    boxes.publish({"a": [TokenChunk("1", finish_reason=FinishReason.STOP)]}, LOAD)
    assert await asyncio.wait_for(reader, 5) == 1
    with pytest.raises(NotReadyError):
        await _drain(boxes)


async def _drain(boxes: Outboxes) -> int:
    return len([data async for data in boxes.read("a")])


async def test_a_stream_with_nothing_to_say_shows_that_its_instance_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LINGER_S", 0.02)
    monkeypatch.setattr(streams, "BEAT_S", 0.05)
    boxes = Outboxes()
    boxes.open_request("a")
    read = boxes.read("a")
    assert [await asyncio.wait_for(anext(read), 5) for _ in range(3)] == [b""] * 3
    await read.aclose()


async def test_an_ingress_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = Outboxes()
    boxes.open_request("a")
    assert boxes.orphans() == []
    monkeypatch.setattr(streams, "ORPHAN_S", -1.0)
    assert boxes.orphans() == ["a"]
    assert boxes.orphans() == []
