"""The API as the official client sees it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from edge import MODEL, Edge
from fakes import expected_answer

from tailserve.engine.errors import QueueFullError

USER: Any = [{"role": "user", "content": "hi"}]


def answer_text(edge: Edge, prompt: str, count: int) -> str:
    text = edge.service._text
    return text.decode(expected_answer(text.encode(prompt, add_special_tokens=False), count))


async def test_chat(edge: Edge) -> None:
    response = await edge.client.chat.completions.create(model=MODEL, messages=USER, max_tokens=9)
    [choice] = response.choices
    assert choice.message.content == answer_text(edge, "<user>hi<assistant>", 9)
    assert choice.finish_reason == "length"
    assert response.usage is not None
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (19, 9)


async def test_an_answer_can_be_sent_back_as_history(edge: Edge) -> None:
    history = list(USER)
    for _ in range(2):
        response = await edge.client.chat.completions.create(model=MODEL, messages=history, max_tokens=3)
        history += [response.choices[0].message, *USER]
    assert response.usage is not None
    assert response.usage.prompt_tokens > 19


async def test_what_asks_for_nothing_is_accepted(edge: Edge) -> None:
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "logit_bias": None,
        "modalities": ["text"],
        "temperature": None,
        "n": None,
    }
    message = {"role": "assistant", "content": "yo", "refusal": "", "annotations": [], "tool_calls": []}
    body = {"messages": [*USER, message, *USER], "max_tokens": 1, "stream_options": {"include_obfuscation": False}}
    response = await edge.http.post("/v1/chat/completions", json=body | harmless)
    assert response.status_code == 200, response.text
    response = await edge.http.post("/v1/completions", json={"prompt": "a", "echo": False, "suffix": "", "best_of": 1})
    assert response.status_code == 200, response.text
    unknown = await edge.http.post("/v1/completions", json={"prompt": "a", "speed": None})
    assert unknown.json()["error"]["code"] == "unknown_parameter"


async def test_one_request_cannot_take_the_whole_queue(edge: Edge) -> None:
    response = await edge.http.post("/v1/completions", json={"prompt": ["a"] * 64, "n": 16})
    assert "1024 answers; at most 128" in response.json()["error"]["message"]


async def test_headers_have_the_limits_of_the_fields(edge: Edge) -> None:
    response = await edge.http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "x" * 129})
    assert response.json()["error"]["param"] == "x-request-id"


async def test_a_body_that_is_too_large(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailserve.deployments.http_answers.MAX_BODY_BYTES", 100)
    response = await edge.http.post("/v1/completions", json={"prompt": "a" * 200})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_too_many_prompts_are_told_the_limit(edge: Edge) -> None:
    response = await edge.http.post("/v1/completions", json={"prompt": ["a"] * 65})
    error = response.json()["error"]
    assert error["param"] == "prompt"
    assert "64" in error["message"]


async def test_an_accident_has_the_shape_of_an_error(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(request: bytes, ingress: str, **_: object) -> str:
        raise ValueError("a bug")

    monkeypatch.setattr(edge.calls, "submit", broken)
    response = await edge.http.post("/v1/completions", json={"prompt": "ab"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


async def test_a_chat_stream_is_the_whole_answer_in_pieces(edge: Edge) -> None:
    stream = await edge.client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == answer_text(edge, "<user>hi<assistant>", 9)
    assert len(texts) > 9
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completions_of_several_prompts_and_choices(edge: Edge) -> None:
    response = await edge.client.completions.create(model=MODEL, prompt=["ab", "cde"], n=2, max_tokens=5)
    assert [choice.text for choice in response.choices] == [
        answer_text(edge, prompt, 5) for prompt in ("ab", "ab", "cde", "cde")
    ]
    assert response.usage is not None
    assert response.usage.prompt_tokens == 5
    twice = await edge.client.completions.create(model=MODEL, prompt=["ab", "ab"], max_tokens=5)
    assert twice.usage is not None
    assert twice.usage.prompt_tokens == 4


async def test_a_stop_string_ends_the_answer_before_it_and_the_sequence_at_once(edge: Edge) -> None:
    full = answer_text(edge, "ab", 60)
    stop = full[20:23]
    edge.calls.executor.step_s = 0.002
    response = await edge.client.completions.create(model=MODEL, prompt="ab", max_tokens=60, stop=[stop, "never"])
    assert response.choices[0].text == full[: full.index(stop)]
    assert response.choices[0].finish_reason == "stop"
    assert response.choices[0].stop_reason == stop  # type: ignore[attr-defined]
    await edge.settle()
    assert edge.calls.engine.stats.generated_tokens < 40


async def test_a_stop_string_before_min_tokens_ends_nothing(edge: Edge) -> None:
    full = answer_text(edge, "ab", 60)
    stops = [full[2:5], full[30:33]]
    answer = await edge.client.completions.create(
        model=MODEL, prompt="ab", max_tokens=60, stop=stops, extra_body={"min_tokens": 20}
    )
    assert answer.choices[0].text == full[: full.index(stops[1], 19)]
    assert answer.choices[0].stop_reason == stops[1]  # type: ignore[attr-defined]


async def test_a_client_that_leaves_frees_its_sequence(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.005
    stream = await edge.client.completions.create(model=MODEL, prompt="ab", max_tokens=100, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await edge.settle()
    assert edge.calls.engine.stats.finished == {"abort": 1}


async def test_abort_request(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.005
    call = asyncio.create_task(
        edge.client.completions.create(model=MODEL, prompt="ab", max_tokens=120, extra_body={"request_id": "mine"})
    )
    while ("", "mine") not in edge.service._running:
        await asyncio.sleep(0.001)
    assert (await edge.http.post("/abort_request", json={"request_id": "mine"})).status_code == 200
    response = await call
    assert response.choices[0].finish_reason == "abort"
    assert (await edge.http.post("/abort_request", json={"request_id": "mine"})).status_code == 404


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"speed": 1}, "speed", "unknown_parameter"),
        ({"tools": [{}]}, "tools", "unsupported_parameter"),
        ({"n": 0}, "n", "invalid_value"),
        ({"top_k": 10**30}, "top_k", "invalid_value"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"n": True}, "n", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
        ({"messages": [*USER, {"role": "system", "content": "late"}]}, "messages", "invalid_request"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_request"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_request"),
        ({"stop_token_ids": [256]}, "stop_token_ids", "invalid_request"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "prompt", "context_length_exceeded"),
    ],
)
async def test_bad_input_is_refused_by_name(edge: Edge, body: dict[str, Any], param: str, code: str) -> None:
    response = await edge.http.post("/v1/chat/completions", json={"messages": USER} | body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


async def test_a_prompt_too_long_is_told_both_numbers(edge: Edge) -> None:
    with pytest.raises(openai.BadRequestError, match=r"150 tokens; the context holds 128"):
        await edge.client.completions.create(model=MODEL, prompt=[1] * 150)


async def test_errors_as_the_client_knows_them(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(openai.NotFoundError, match="'nope' is not served here"):
        await edge.client.chat.completions.create(model="nope", messages=USER)
    with pytest.raises(openai.NotFoundError):
        await edge.client.models.retrieve("nope")

    async def full(request: bytes, ingress: str, **_: object) -> str:
        raise QueueFullError("full", retry_after_s=2.4)

    monkeypatch.setattr(edge.calls, "submit", full)
    with pytest.raises(openai.RateLimitError) as caught:
        await edge.client.chat.completions.create(model=MODEL, messages=USER)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.response.headers["retry-after-ms"] == "2400"


async def test_503_until_the_model_is_loaded(tmp_path: Path) -> None:
    edge = Edge(tmp_path, ready=False)
    await edge.open()
    with pytest.raises(openai.InternalServerError) as caught:
        await edge.client.chat.completions.create(model=MODEL, messages=USER)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert (await edge.http.get("/ready")).status_code == 503
    assert (await edge.http.get("/health")).status_code == 200
    await edge.close()


async def test_more_than_max_queued_of_a_class_are_refused_and_the_other_class_is_not(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.02
    calls = [asyncio.create_task(edge.client.completions.create(model=MODEL, prompt="ab", max_tokens=30)) for _ in range(30)]
    await asyncio.sleep(0.1)
    urgent = await edge.client.completions.create(model=MODEL, prompt="ab", max_tokens=2, extra_body={"priority": -1})
    assert urgent.choices[0].text == answer_text(edge, "ab", 2)
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert 0 < len(refused) < 30
    assert all(isinstance(result, openai.types.Completion) for result in results if result not in refused)


@pytest.mark.parametrize(
    ("headers", "body", "priority"),
    [
        ({}, {}, 10),
        ({}, {"service_tier": "priority"}, 0),
        ({}, {"priority": -1}, 0),
        ({}, {"priority": -1, "service_tier": "default"}, 10),
        ({"X-SLO-Class": "critical"}, {"service_tier": "flex"}, 0),
    ],
)
async def test_the_class_comes_from_header_tier_or_priority(
    edge: Edge, headers: dict[str, str], body: dict[str, Any], priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    submit = edge.calls.loop.submit
    monkeypatch.setattr(edge.calls.loop, "submit", lambda request, ingress: (seen.append(request), submit(request, ingress)))
    answer = await edge.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 1} | body, headers=headers)
    assert [request.slo_class for request in seen] == ["critical" if priority == 0 else "normal"]
    got = ("priority" if priority == 0 else body["service_tier"]) if "service_tier" in body else None
    assert answer.json().get("service_tier") == got


async def test_a_request_for_any_tier_is_told_which_it_got(edge: Edge) -> None:
    answer = await edge.client.chat.completions.create(model=MODEL, messages=USER, max_tokens=1, service_tier="auto")
    assert answer.service_tier == "default"


async def test_an_unknown_class_is_told_the_known_ones(edge: Edge) -> None:
    response = await edge.http.post("/v1/completions", json={"prompt": "a"}, headers={"X-SLO-Class": "gold"})
    assert "critical, normal" in response.json()["error"]["message"]


async def test_more_tokens_than_a_context_holds_are_refused_unread(edge: Edge) -> None:
    for path, name, value in (
        ("/detokenize", "tokens", [1] * 129),
        ("/v1/completions", "prompt", [-1] * 129),
        ("/v1/completions", "prompt", [[1], [-1] * 129]),
    ):
        error = (await edge.http.post(path, json={name: value})).json()["error"]
        assert (error["param"], error["code"]) == (name, "context_length_exceeded")


async def test_tokenize_and_back(edge: Edge) -> None:
    tokens = (await edge.http.post("/tokenize", json={"prompt": "größer"})).json()
    assert tokens["count"] == len("größer".encode())
    back = await edge.http.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json()["prompt"] == "größer"
    chat = (await edge.http.post("/tokenize", json={"messages": USER})).json()
    assert chat["count"] == 19


async def test_unknown_routes_and_broken_json(edge: Edge) -> None:
    assert (await edge.http.get("/v2/nothing")).json()["error"]["code"] == "not_found"
    assert (await edge.http.get("/v1/completions")).status_code == 405
    assert [(await edge.http.head(path)).status_code for path in ("/", "/health", "/v1/completions")] == [200, 200, 405]
    for content in (b"{", b'{"prompt": "\xff"}', b"[" * 100_000, b"[]"):
        broken = await edge.http.post("/v1/completions", content=content)
        assert broken.json()["error"]["code"] == "invalid_json"


async def test_models_and_version(edge: Edge) -> None:
    models = [model async for model in edge.client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert "version" in (await edge.http.get("/version")).json()


async def test_an_error_in_mid_stream_is_an_event(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.005
    edge.calls.executor.restart = _cannot  # type: ignore[method-assign]
    lines = []
    async with edge.http.stream(
        "POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 90, "stream": True}
    ) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                edge.calls.executor.fail_next = 1
    assert lines[-1] == "[DONE]"
    assert "cannot be restarted" in json.loads(lines[-2])["error"]["message"]


def _cannot() -> None:
    from tailserve.engine.errors import ExecutorLostError

    raise ExecutorLostError("it cannot be restarted")
