import asyncio

import msgspec
import pytest

from tailserve.deployments import client as client_module
from tailserve.deployments import streams
from tailserve.deployments.client import RouterClient
from tailserve.deployments.streams import Outboxes, StepMessage
from tailserve.engine.errors import NotReadyError
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import FinishReason, Request, SamplingParams, TokenChunk

LOAD = InstanceLoad(0, {}, 0.001)


def request(name: str) -> Request:
    return Request(id=name, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1, seed=0), slo_class="normal")


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


async def test_an_ingress_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = Outboxes()
    boxes.open_request("a")
    assert boxes.orphans() == []
    monkeypatch.setattr(streams, "ORPHAN_S", -1.0)
    assert boxes.orphans() == ["a"]
    assert boxes.orphans() == []


class Instances:
    """Two instances; the stream of `broken` fails."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.boxes = {name: asyncio.Queue[bytes]() for name in ("here", "broken")}
        self.target = "here"
        self.asked: list[dict[str, str | None]] = []
        self.slow = asyncio.Event()
        self.slow.set()

    async def submit(self, data: bytes, ingress: str, **affinity: str | None) -> str:
        await self.slow.wait()
        self.asked.append(affinity)
        return self.target

    async def stream(self, ingress: str, *, instance: str):  # type: ignore[no-untyped-def]
        while True:
            if instance == "broken":
                raise RuntimeError("it died")
            yield await self.boxes[instance].get()

    async def abort(self, request_ids: list[str], *, instance: str) -> None:
        self.aborted += request_ids

    async def status(self) -> dict[str, object]:
        return {}

    def push(self, *chunks: TokenChunk) -> None:
        self.boxes["here"].put_nowait(msgspec.msgpack.encode(StepMessage(list(chunks), LOAD)))


async def test_requests_of_an_instance_that_dies_end_with_an_error() -> None:
    instances = Instances()
    instances.target = "broken"
    client, queue = RouterClient(instances, submit_timeout_s=1), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    chunk = await asyncio.wait_for(queue.get(), 5)
    assert chunk.finish_reason is FinishReason.ERROR
    assert "it died" in (chunk.error or "")


async def test_a_request_cancelled_before_it_was_placed_is_ended_where_it_turns_up() -> None:
    instances = Instances()
    client, queue = RouterClient(instances, submit_timeout_s=5), asyncio.Queue[TokenChunk]()
    await client.submit(request("other"), queue)
    instances.slow.clear()
    call = asyncio.create_task(client.submit(request("r"), queue))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    instances.slow.set()
    instances.push(TokenChunk("r", (1,)))
    while not instances.aborted:
        await asyncio.sleep(0.005)
    assert set(instances.aborted) == {"r"}


async def test_no_instance_in_time() -> None:
    instances = Instances()
    instances.slow.clear()
    client = RouterClient(instances, submit_timeout_s=0.02)
    with pytest.raises(NotReadyError, match="no instance took the request"):
        await client.submit(request("r"), asyncio.Queue())


async def test_a_request_cancelled_before_it_was_placed_needs_no_stream_to_be_ended() -> None:
    instances = Instances()
    instances.slow.clear()
    client = RouterClient(instances, submit_timeout_s=0.02)
    with pytest.raises(NotReadyError):
        await client.submit(request("r"), asyncio.Queue())
    instances.slow.set()
    while not instances.aborted:
        await asyncio.sleep(0.005)
    assert set(instances.aborted) == {"r"}


async def test_a_session_asks_for_the_instance_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MOST_HOMES", 2)
    instances = Instances()
    client = RouterClient(instances, submit_timeout_s=5)
    for number, session_id in enumerate([None, "s", "s", "t", "u", "s"]):
        scope = None if session_id is None else f"scope of {session_id}"
        asked = msgspec.structs.replace(request(str(number)), session_id=session_id, scope=scope)
        await client.submit(asked, asyncio.Queue())
    assert [(asked["placing"].session, asked["placing"].last) for asked in instances.asked] == [
        (None, None),
        ("scope of s", None),
        ("scope of s", "here"),
        ("scope of t", None),
        ("scope of u", None),
        ("scope of s", None),
    ]
