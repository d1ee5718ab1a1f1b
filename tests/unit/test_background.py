"""Responses that go on without their reader."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from edge import MODEL, Edge

from tailserve.deployments import background
from tailserve.deployments.background import Background
from tailserve.deployments.generation import Choice

BODY: dict[str, Any] = {"model": MODEL, "input": "hi", "max_output_tokens": 40, "temperature": 0}


async def test_a_dropped_stream_is_taken_up_where_it_broke_off(edge: Edge) -> None:
    expected = await edge.client.responses.create(**BODY)
    edge.calls.executor.step_s = 0.01
    stream = await edge.client.responses.create(**BODY, background=True, stream=True)
    seen = []
    async for event in stream:
        seen.append(event)
        if len(seen) == 10:
            break
    await stream.close()
    response_id = seen[0].response.id  # type: ignore[union-attr]
    last = seen[-1].sequence_number
    by_header = await edge.http.get(f"/v1/responses/{response_id}?stream=true", headers={"Last-Event-ID": str(last)})
    rest = await edge.client.responses.retrieve(response_id, stream=True, starting_after=last)
    seen += [event async for event in rest]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert text == expected.output_text
    ids = [int(line.removeprefix("id: ")) for line in by_header.text.splitlines() if line.startswith("id: ")]
    assert ids == list(range(last + 1, len(seen)))


async def test_it_is_there_while_it_goes_on_and_after(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.01
    first = await edge.client.responses.create(**BODY, background=True)
    assert first.status == "in_progress"
    assert (await edge.http.head(f"/v1/responses/{first.id}?stream=true")).status_code == 200
    assert (await edge.client.responses.retrieve(first.id)).status == "in_progress"
    await edge.service.background.finish()
    done = await edge.client.responses.retrieve(first.id)
    assert done.status == "incomplete"
    assert len(done.output_text) > 0


async def test_cancel_ends_it_and_so_does_delete(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.02
    first, second = [await edge.client.responses.create(**BODY, background=True) for _ in range(2)]
    await edge.client.responses.cancel(first.id)
    await edge.client.responses.delete(second.id)
    await edge.settle()
    assert edge.calls.engine.stats.generated_tokens < 40
    with pytest.raises(openai.NotFoundError):
        await edge.client.responses.retrieve(second.id, stream=True)


async def test_one_that_fails_says_so_to_whoever_comes_back(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "take", lambda *_: 1 / 0)
    first = await edge.client.responses.create(**BODY, background=True)
    await edge.service.background.finish()
    found = await edge.client.responses.retrieve(first.id)
    assert found.status == "failed"
    events = [event async for event in await edge.client.responses.retrieve(first.id, stream=True)]
    assert events[-1].type == "response.failed"
    await edge.settle()


async def test_a_deleted_session_leaves_nothing(edge: Edge) -> None:
    body = BODY | {"extra_body": {"session_id": "s"}}
    done = await edge.client.responses.create(**body, background=True)
    await edge.service.background.finish()
    edge.calls.executor.step_s = 0.01
    running = await edge.client.responses.create(**body, background=True)
    await edge.http.delete("/v1/sessions/s")
    await edge.service.background.finish()
    for response in (done, running):
        for stream in (False, True):
            answer = await edge.http.get(f"/v1/responses/{response.id}", params={"stream": stream})
            assert answer.status_code == 404


async def test_the_tenant_with_most_loses_its_oldest(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> str:
        response = await edge.client.responses.create(**BODY, background=True)
        await edge.service.background.finish()
        return response.id

    first = await run()
    entry = edge.service.background.find("", first)
    assert entry is not None
    kept = edge.service.background = Background(max_bytes=3 * entry.num_bytes + 50)
    kept._ended.keep("other", "x", entry)
    ids = [await run() for _ in range(3)]
    found = [name for name in ids if kept.find("", name)]
    assert found == ids[1:]
    assert kept.find("other", "x") is not None
    monkeypatch.setattr(background, "KEPT_S", 0.0)
    last = await run()
    await asyncio.sleep(0.01)
    assert kept.find("", last) is None


async def test_over_a_websocket_there_is_no_background(edge: Edge) -> None:
    async with edge.client.responses.connect() as connection:
        await connection.response.create(**BODY, background=True)
        event: Any = await connection.recv()
        assert event.type == "error"
        assert "leave background out" in event.error.message


@pytest.mark.parametrize(
    ("query", "header", "param"), [("&starting_after=x", "1", "starting_after"), ("", "x", "Last-Event-ID")]
)
async def test_a_place_that_is_no_number_is_refused(edge: Edge, query: str, header: str, param: str) -> None:
    answer = await edge.http.get(f"/v1/responses/resp_1?stream=true{query}", headers={"Last-Event-ID": header})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
