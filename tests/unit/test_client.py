"""Requests of an ingress at instances that die, fall silent and come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from tailserve.cluster.affinity import Placing
from tailserve.cluster.config import Timeouts
from tailserve.deployments import client as client_module
from tailserve.deployments.client import RouterClient
from tailserve.deployments.streams import StepMessage
from tailserve.engine.errors import InvalidRequestError, NotReadyError, TailserveError
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import FinishReason, Request, SamplingParams, TokenChunk, Usage

LOAD = InstanceLoad(0, {}, 0.001)


def request(name: str) -> Request:
    return Request(id=name, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=9, seed=0), slo_class="normal")


def client_of(instances: Instances, submit_s: float = 5.0, **timeouts: float) -> RouterClient:
    settings = Timeouts.model_construct(**(Timeouts().model_dump() | {"submit_s": submit_s} | timeouts))
    return RouterClient(instances, settings, max_open=8)


class Instances:
    """Instances by name, each as alive as the test wants it; requests go to the first that is left to them."""

    def __init__(self, *names: str) -> None:
        self.alive = list(names or ["here"])
        self.boxes = {name: asyncio.Queue[bytes]() for name in self.alive}
        self.submitted: list[tuple[str, Request, Placing]] = []
        self.names: list[str] = []
        self.streams: list[str] = []
        """What requests and streams name their ingress."""
        self.aborted: list[str] = []
        self.refusal: TailserveError | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def submit(self, data: bytes, ingress: str, *, placing: Placing) -> tuple[str, TailserveError | None]:
        await self.open.wait()
        left = [name for name in self.alive if name not in placing.avoid] or self.alive
        if not left:
            raise NotReadyError("there is none")
        self.names.append(ingress)
        self.submitted.append((left[0], msgspec.msgpack.decode(data, type=Request), placing))
        return left[0], self.refusal

    async def stream(self, ingress: str, *, instance: str) -> AsyncIterator[bytes]:
        self.streams.append(ingress)
        while True:
            data = await self.boxes[instance].get()
            if data == b"die":
                raise RuntimeError("it died")
            yield data

    async def abort(self, request_ids: list[str], *, instance: str) -> None:
        self.aborted += request_ids

    async def drop_session(self, tenant: str, session_id: str) -> int:
        return 0

    async def status(self) -> dict[str, object]:
        return {}

    def push(self, instance: str, *chunks: TokenChunk) -> None:
        self.boxes[instance].put_nowait(msgspec.msgpack.encode(StepMessage(list(chunks), LOAD)))

    def kill(self, instance: str) -> None:
        self.alive.remove(instance)
        self.boxes[instance].put_nowait(b"die")

    async def until_submitted(self, count: int) -> Request:
        while len(self.submitted) < count:
            await asyncio.sleep(0.005)
        return self.submitted[-1][1]


async def test_a_request_goes_on_where_its_dead_instance_left_off() -> None:
    instances = Instances("a", "b")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(msgspec.structs.replace(request("r"), age_s=2.0), queue)
    instances.push("a", TokenChunk("r", (5, 6), usage=Usage(cached_tokens=1, accepted_draft_tokens=1)))
    assert (await queue.get()).token_ids == (5, 6)
    instances.kill("a")
    carried = await instances.until_submitted(2)
    assert instances.submitted[-1][0] == "b"
    assert carried.carried == (5, 6)
    assert carried.prompt_token_ids == (1,)
    assert 2.0 < carried.age_s < 4.0
    instances.push("b", TokenChunk(carried.id, (7,), None, FinishReason.LENGTH, usage=Usage(0, 2, 1)))
    assert await queue.get() == TokenChunk("r", (7,), None, FinishReason.LENGTH, usage=Usage(1, 3, 1))


async def test_what_an_instance_says_of_a_request_that_left_it_counts_for_nothing() -> None:
    instances = Instances("a", "b")
    client, queue = client_of(instances, silence_s=0.1), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    carried = await instances.until_submitted(2)
    # It was only slow. Another request opens its stream again.
    instances.alive.remove("b")
    await client.submit(request("other"), queue)
    instances.push("a", TokenChunk("r", (5,)))
    instances.push("b", TokenChunk(carried.id, (5,)))
    assert await queue.get() == TokenChunk("r", (5,))
    assert instances.aborted[0] == "r"
    assert queue.empty()


async def test_a_stream_that_broke_cannot_take_what_is_for_the_next() -> None:
    instances = Instances("a")
    client, queue = client_of(instances, silence_s=0.1), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    carried = await instances.until_submitted(2)
    while len(instances.streams) < 2:
        await asyncio.sleep(0.005)
    assert instances.streams == instances.names
    assert instances.names[0] != instances.names[1]
    instances.push("a", TokenChunk(carried.id, (5,), finish_reason=FinishReason.LENGTH))
    assert (await queue.get()).token_ids == (5,)


async def test_a_word_that_comes_after_its_instance_was_lost_does_not_count() -> None:
    instances, queue = Instances("a"), asyncio.Queue[TokenChunk]()
    client = client_of(instances, silence_s=0.2)
    await client.submit(request("other"), asyncio.Queue())
    instances.open.clear()
    call = asyncio.create_task(client.submit(request("r"), queue))
    while not client._lost:
        await asyncio.sleep(0.005)
    instances.open.set()
    await call
    taken = [(name, some.id) for name, (_, some, _) in zip(instances.names, instances.submitted, strict=True)]
    last = next(name for name, attempt in reversed(taken) if attempt.startswith("r"))
    assert "r" in instances.aborted
    assert last != instances.names[0]


async def test_an_instance_with_nothing_to_say_is_not_lost_while_its_heart_beats() -> None:
    instances = Instances("a", "b")
    client = client_of(instances, silence_s=0.2)
    await client.submit(request("r"), asyncio.Queue())
    for _ in range(6):
        instances.boxes["a"].put_nowait(b"")
        await asyncio.sleep(0.05)
    assert len(instances.submitted) == 1
    await instances.until_submitted(2)


async def test_what_an_instance_gives_up_goes_on_at_another() -> None:
    instances = Instances("a", "b")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    instances.push("a", TokenChunk("r", (5,)), TokenChunk("r", finish_reason=FinishReason.LOST, error="it stops"))
    carried = await instances.until_submitted(2)
    assert carried.carried == (5,)
    # The stream of an instance that only this request left is still read.
    instances.push("b", TokenChunk(carried.id, (6,), finish_reason=FinishReason.STOP))
    assert [(await queue.get()).token_ids for _ in range(2)] == [(5,), (6,)]


async def test_a_request_waits_for_an_instance_to_come_back() -> None:
    instances = Instances("a")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    instances.kill("a")
    await asyncio.sleep(0.25)
    assert queue.empty()
    instances.alive, instances.boxes["a2"] = ["a2"], asyncio.Queue()
    carried = await instances.until_submitted(2)
    instances.push("a2", TokenChunk(carried.id, (5,), finish_reason=FinishReason.STOP))
    assert (await queue.get()).token_ids == (5,)


async def test_a_request_that_no_instance_takes_over_ends_with_an_error() -> None:
    instances = Instances("a")
    client, queue = client_of(instances, carry_s=0.15), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    instances.kill("a")
    chunk = await asyncio.wait_for(queue.get(), 5)
    assert chunk.finish_reason is FinishReason.ERROR
    assert "it died; no other took it over" in (chunk.error or "")
    client.cancel("r")


async def test_a_request_that_takes_its_instances_down_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MOST_CARRIED", 1)
    instances = Instances("a", "b", "c")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    instances.kill("a")
    await instances.until_submitted(2)
    instances.kill("b")
    chunk = await asyncio.wait_for(queue.get(), 5)
    assert chunk.finish_reason is FinishReason.ERROR
    assert len(instances.submitted) == 2


async def test_a_request_cancelled_while_it_looks_for_an_instance_is_ended_where_it_turns_up() -> None:
    instances = Instances("a", "b")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), queue)
    instances.open.clear()
    instances.kill("a")
    await asyncio.sleep(0.05)
    client.cancel("r")
    instances.open.set()
    carried = await instances.until_submitted(2)
    while carried.id not in instances.aborted:
        await asyncio.sleep(0.005)
    assert queue.empty()


async def test_another_instance_is_asked_when_one_cannot_take_a_request() -> None:
    instances = Instances("a", "b")
    instances.refusal = NotReadyError("this instance is shutting down")
    client = client_of(instances)
    with pytest.raises(NotReadyError):
        await client.submit(request("r"), asyncio.Queue())
    assert [name for name, _, _ in instances.submitted] == ["a", "b", "a"]
    instances.refusal = InvalidRequestError("no such class", param="slo_class")
    with pytest.raises(InvalidRequestError):
        await client.submit(request("r"), asyncio.Queue())
    assert len(instances.submitted) == 4


async def test_a_request_cancelled_before_it_was_placed_is_ended_where_it_turns_up() -> None:
    instances = Instances()
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(request("other"), queue)
    instances.open.clear()
    call = asyncio.create_task(client.submit(request("r"), queue))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    instances.open.set()
    instances.push("here", TokenChunk("r", (1,)))
    while not instances.aborted:
        await asyncio.sleep(0.005)
    assert set(instances.aborted) == {"r"}


async def test_no_instance_in_time() -> None:
    instances = Instances()
    instances.open.clear()
    client = client_of(instances, submit_s=0.02)
    with pytest.raises(NotReadyError, match="no instance took the request"):
        await client.submit(request("r"), asyncio.Queue())


async def test_a_request_cancelled_before_it_was_placed_needs_no_stream_to_be_ended() -> None:
    instances = Instances()
    instances.open.clear()
    client = client_of(instances, submit_s=0.02)
    with pytest.raises(NotReadyError):
        await client.submit(request("r"), asyncio.Queue())
    instances.open.set()
    while not instances.aborted:
        await asyncio.sleep(0.005)
    assert set(instances.aborted) == {"r"}


async def test_a_session_asks_for_the_instance_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MOST_HOMES", 2)
    instances = Instances()
    client = client_of(instances)
    for number, session_id in enumerate([None, "s", "s", "t", "u", "s"]):
        scope = None if session_id is None else f"scope of {session_id}"
        asked = msgspec.structs.replace(request(str(number)), session_id=session_id, scope=scope)
        await client.submit(asked, asyncio.Queue())
    assert [(placing.session, placing.last) for _, _, placing in instances.submitted] == [
        (None, None),
        ("scope of s", None),
        ("scope of s", "here"),
        ("scope of t", None),
        ("scope of u", None),
        ("scope of s", None),
    ]


async def test_an_ingress_holds_no_more_than_it_may() -> None:
    instances = Instances()
    client, told = client_of(instances), []
    client.on_refusal = lambda _, error: told.append(error.code)
    for number in range(8):
        await client.submit(request(str(number)), asyncio.Queue())
    with pytest.raises(NotReadyError, match="8 sequences are open here") as refused:
        await client.submit(request("r"), asyncio.Queue())
    assert refused.value.retry_after_s == 1.0
    assert told == ["not_ready"]
    client.cancel("3")
    await client.submit(request("r"), asyncio.Queue())


async def test_who_leaves_at_the_moment_of_a_loss_costs_nobody_else_anything() -> None:
    instances = Instances("a", "b")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(request("r"), asyncio.Queue())
    instances.push("a", TokenChunk("r", finish_reason=FinishReason.LOST, error="it stops"))
    # The stream is read, and its client leaves before anything else happens.
    client.receive("a", instances.boxes["a"].get_nowait())
    client.cancel("r")
    instances.alive = ["b"]
    await client.submit(request("other"), queue)
    await asyncio.sleep(0.05)
    assert [asked.id for _, asked, _ in instances.submitted] == ["r", "other"]
    instances.push("b", TokenChunk("other", (1,), finish_reason=FinishReason.STOP))
    assert (await queue.get()).token_ids == (1,)
    assert not client._attempts


async def unanswered(instances: Instances, queue: asyncio.Queue[TokenChunk]) -> asyncio.Task[None]:
    """Places "r", of which an instance says nothing although it is being listened to, until `instances.open` is set."""
    client = client_of(instances)
    await client.submit(request("other"), asyncio.Queue())
    instances.open.clear()
    return asyncio.create_task(client.submit(request("r"), queue))


async def test_one_that_is_asked_and_does_not_answer_is_not_listened_to_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ASK_S", 0.05)
    instances, queue = Instances("a"), asyncio.Queue[TokenChunk]()
    call = await unanswered(instances, queue)
    await asyncio.sleep(0.2)
    instances.open.set()
    await call
    taken = instances.submitted[-1][1].id
    assert taken != "r"
    # It had heard it the first time, too.
    instances.push("a", TokenChunk("r", (8,)), TokenChunk(taken, (5,)))
    assert await queue.get() == TokenChunk("r", (5,))
    while "r" not in instances.aborted:
        await asyncio.sleep(0.005)
    assert queue.empty()


async def test_others_avoid_an_instance_that_was_lost_until_it_is_heard_of() -> None:
    instances = Instances("a", "b")
    client = client_of(instances, silence_s=0.1)
    await client.submit(request("r"), asyncio.Queue())
    await instances.until_submitted(2)
    await client.submit(request("new"), asyncio.Queue())
    assert instances.submitted[-1][0] == "b"
    instances.push("a", TokenChunk("r", (1,)))
    client._read("a", client._ingress)
    while client._lost.get("a"):
        await asyncio.sleep(0.005)
    await client.submit(request("newer"), asyncio.Queue())
    assert instances.submitted[-1][0] == "a"


async def test_a_request_whose_time_is_over_while_it_looks_for_an_instance_ends_with_what_it_has() -> None:
    instances = Instances("a")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(msgspec.structs.replace(request("r"), timeout_s=0.4), queue)
    instances.push("a", TokenChunk("r", (5,)))
    await queue.get()
    instances.kill("a")
    chunk = await asyncio.wait_for(queue.get(), 5)
    assert (chunk.finish_reason, chunk.stop_reason) == (FinishReason.LENGTH, "deadline")


async def test_what_no_instance_took_is_told() -> None:
    instances = Instances("a")
    client = client_of(instances)
    told: list[tuple[str, str]] = []
    client.on_refusal = lambda refused, error: told.append((refused.id, error.code))
    instances.refusal = InvalidRequestError("no such class", param="slo_class")
    with pytest.raises(InvalidRequestError):
        await client.submit(request("r"), asyncio.Queue())
    assert told == [("r", "invalid_request")]


async def test_tokens_that_come_before_the_word_that_a_request_was_taken_are_not_sent_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "ASK_S", 0.1)
    instances, queue = Instances("a"), asyncio.Queue[TokenChunk]()
    placing = await unanswered(instances, queue)
    await asyncio.sleep(0.02)
    instances.push("a", TokenChunk("r", (5,)))
    assert (await queue.get()).token_ids == (5,)
    await asyncio.sleep(0.15)
    instances.open.set()
    await placing
    assert instances.submitted[-1][1].carried == (5,)


async def test_a_request_whose_instance_hangs_ends_when_its_time_is_over() -> None:
    instances = Instances("a")
    client, queue = client_of(instances), asyncio.Queue[TokenChunk]()
    await client.submit(msgspec.structs.replace(request("r"), timeout_s=0.2), queue)
    chunk = await asyncio.wait_for(queue.get(), 5)
    assert (chunk.finish_reason, chunk.stop_reason) == (FinishReason.LENGTH, "deadline")
    while "r" not in instances.aborted:
        await asyncio.sleep(0.005)
