"""The Responses API over HTTP and over a WebSocket, through OpenAI's own client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from edge import MODEL, Edge

from tailserve.deployments.conversations import Conversations, StoredResponse
from tailserve.engine.errors import NotFoundError


async def test_a_response_and_the_next_that_goes_on_from_it(edge: Edge) -> None:
    first = await edge.client.responses.create(model=MODEL, input="hi", max_output_tokens=12, temperature=0)
    assert first.status == "incomplete"
    assert first.incomplete_details is not None
    assert first.incomplete_details.reason == "max_output_tokens"
    assert first.usage is not None
    assert (first.usage.input_tokens, first.usage.output_tokens) == (len("<user>hi<assistant>"), 12)
    second = await edge.client.responses.create(
        model=MODEL, input="more", previous_response_id=first.id, max_output_tokens=12, temperature=0
    )
    whole: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "more"},
    ]
    chat = await edge.client.chat.completions.create(model=MODEL, messages=whole, max_tokens=12, temperature=0)
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None
    # All full blocks of what was there: the KV of an answer's last token is never computed.
    assert second.usage.input_tokens_details.cached_tokens == (first.usage.total_tokens - 1) // 4 * 4
    by_items = await edge.client.responses.create(model=MODEL, input=whole, max_output_tokens=12, temperature=0)
    assert by_items.output_text == second.output_text


async def test_a_stream_has_the_whole_answer_and_numbered_events(edge: Edge) -> None:
    body: dict[str, Any] = {"model": MODEL, "input": "hi", "max_output_tokens": 12, "temperature": 0}
    whole = await edge.client.responses.create(**body)
    stream = await edge.client.responses.create(**body, stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events if event.type != "response.output_text.delta"]
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added",
                     "output_text.done", "content_part.done", "output_item.done", "incomplete"]  # fmt: skip
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text


async def test_instructions_hold_for_one_response(edge: Edge) -> None:
    first = await edge.client.responses.create(model=MODEL, input="hi", instructions="be brief", max_output_tokens=4)
    assert first.usage is not None
    assert first.usage.input_tokens == len("<system>be brief<user>hi<assistant>")
    second = await edge.client.responses.create(model=MODEL, input="go", previous_response_id=first.id, max_output_tokens=4)
    assert second.usage is not None
    assert second.usage.input_tokens == len(f"<user>hi<assistant>{first.output_text}<user>go<assistant>")


async def test_stored_responses_are_found_until_they_are_deleted(edge: Edge) -> None:
    first = await edge.client.responses.create(model=MODEL, input="hi", max_output_tokens=4)
    assert (await edge.client.responses.retrieve(first.id)).output_text == first.output_text
    await edge.client.responses.delete(first.id)
    secret = await edge.client.responses.create(model=MODEL, input="hi", max_output_tokens=4, store=False)
    for response_id in (first.id, secret.id):
        with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
            await edge.client.responses.retrieve(response_id)
        with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
            await edge.client.responses.create(model=MODEL, input="go", previous_response_id=response_id)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "hi", "speed": 1}, "speed"),
        ({"input": [{"role": "robot", "content": "hi"}]}, "input.0.role"),
        ({"input": "hi", "background": True, "store": False}, "background"),
    ],
)
async def test_bad_input_is_refused_by_name(edge: Edge, body: dict[str, Any], param: str) -> None:
    answer = await edge.http.post("/v1/responses", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_cancel_ends_a_response_at_once(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.02
    stream = await edge.client.responses.create(model=MODEL, input="hi", max_output_tokens=100, stream=True)
    events = []
    async for event in stream:
        events.append(event)
        if len(events) == 6:
            await edge.client.responses.cancel(events[0].response.id)  # type: ignore[union-attr]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "cancelled"
    assert last.response.usage is not None
    assert last.response.usage.output_tokens < 20


async def test_two_turns_over_one_websocket(edge: Edge) -> None:
    body: dict[str, Any] = {"model": MODEL, "max_output_tokens": 12, "temperature": 0}
    async with edge.client.responses.connect() as connection:
        answers = []
        for text in ("hi", "more"):
            previous = {"previous_response_id": answers[-1].id} if answers else {}
            await connection.response.create(**body, input=text, **previous)
            async for event in connection:
                if event.type == "response.incomplete":
                    answers.append(event.response)
                    break
    first, second = answers
    assert second.usage.input_tokens_details.cached_tokens == (first.usage.total_tokens - 1) // 4 * 4


async def test_a_websocket_says_what_is_wrong_and_goes_on(edge: Edge) -> None:
    async with edge.client.responses.connect() as connection:
        await connection.send({"type": "response.create", "model": "other", "input": "hi"})
        error = await connection.recv()
        assert error.type == "error"
        assert "not served here" in error.error.message
        await connection.response.create(model=MODEL, input="hi", max_output_tokens=2)
        kinds = [(await connection.recv()).type for _ in range(2)]
        assert kinds == ["response.created", "response.in_progress"]


@pytest.mark.parametrize("how", ["cancel", "drop"])
async def test_a_websocket_that_is_cancelled_or_dropped_frees_its_sequence(edge: Edge, how: str) -> None:
    edge.calls.executor.step_s = 0.02
    async with edge.client.responses.connect() as connection:
        await connection.response.create(model=MODEL, input="hi", max_output_tokens=100)
        while (await connection.recv()).type != "response.output_text.delta":
            pass
        steps = edge.calls.engine.stats.steps
        if how == "cancel":
            await connection.send_raw('{"type": "response.cancel"}')
            while (event := await connection.recv()).type != "response.incomplete":
                pass
            assert event.response.status == "cancelled"
    while edge.calls.engine.gauges().num_running:
        await asyncio.sleep(0.001)
    assert edge.calls.engine.stats.steps <= steps + 3


async def test_every_turn_over_one_websocket_has_a_name_of_its_own_whatever_the_proxy_says(edge: Edge) -> None:
    async with edge.client.responses.connect(extra_headers={"X-Request-Id": "same"}) as connection:
        names = []
        for _ in range(2):
            await connection.response.create(model=MODEL, input="hi", max_output_tokens=2)
            while (event := await connection.recv()).type != "response.incomplete":
                pass
            names.append(event.response.id)
    assert len(set(names)) == 2
    assert "same" not in "".join(names)


async def test_a_binary_frame_is_refused_and_the_conversation_goes_on(edge: Edge) -> None:
    async with edge.client.responses.connect() as connection:
        await connection.send_raw(b"\x00")
        error = await connection.recv()
        assert error.type == "error"
        await connection.response.create(model=MODEL, input="hi", max_output_tokens=2)
        assert (await connection.recv()).type == "response.created"


async def test_a_deleted_session_takes_its_responses_along(edge: Edge) -> None:
    body: dict[str, Any] = {"model": MODEL, "max_output_tokens": 4, "extra_body": {"session_id": "s", "cache_salt": "x"}}
    first = await edge.client.responses.create(input="hello there", **body)
    await edge.http.delete("/v1/sessions/s")
    with pytest.raises(openai.NotFoundError):
        await edge.client.responses.retrieve(first.id)
    again = await edge.client.responses.create(input="hello there", **body)
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens == 0


async def test_a_prompt_cache_key_is_shared_without_a_session(edge: Edge) -> None:
    body: dict[str, Any] = {"model": MODEL, "max_output_tokens": 4, "prompt_cache_key": "k", "input": "hello there"}
    for expected in (0, len("<user>hello there<assistant>") // 4 * 4 - 4):
        answer = await edge.client.responses.create(**body)
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.cached_tokens >= expected
    assert edge.calls.engine.scheduler.pins.num_blocks == 0


async def test_too_many_messages_are_refused_by_name(edge: Edge) -> None:
    items = [{"role": "user", "content": "a"}] * 4096
    answer = await edge.http.post("/v1/responses", json={"input": items, "instructions": "b"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


def test_the_tenant_that_stores_most_loses_its_oldest() -> None:
    conversations = Conversations(max_bytes=20_000)
    for number in range(30):
        conversations.keep("loud", StoredResponse(f"r{number}", b"{}", ({"role": "user", "content": "a"},), None))
    conversations.keep("quiet", StoredResponse("q", b"{}", (), "s"))
    assert conversations.get("quiet", "q").session_id == "s"
    assert conversations.get("loud", "r29").id == "r29"
    with pytest.raises(NotFoundError):
        conversations.get("loud", "r0")
    conversations.drop_session("quiet", "s")
    with pytest.raises(NotFoundError):
        conversations.drop("quiet", "q")
