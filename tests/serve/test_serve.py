"""The whole path over HTTP, in all its processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from harness import MODEL, PROMPTS, SLOTS, Server, stream_text
from ray.exceptions import RayError

from tailserve.cluster.config import Timeouts
from tailserve.deployments.client import RouterClient
from tailserve.deployments.ingress import ServeCalls
from tailserve.deployments.models import resolve_model
from tailserve.deployments.text import TextModel
from tailserve.engine.types import Request, SamplingParams, TokenChunk


def test_503_while_the_model_is_loading(server: Server) -> None:
    error = server.refused_while_loading
    assert error is not None
    assert "still loading" in error.message
    assert int(error.response.headers["retry-after"]) > 0


def test_a_chat_makes_sense(server: Server) -> None:
    response = server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is gravity?"}], temperature=0, max_tokens=60
    )
    text = response.choices[0].message.content or ""
    assert text.startswith("Gravity is a")
    assert "physics" in text


def test_a_chat_stream_equals_the_whole_answer(server: Server) -> None:
    fields = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0,
        "max_tokens": 30,
    }
    whole = server.client.chat.completions.create(**fields)  # type: ignore[call-overload]
    stream = server.client.chat.completions.create(**fields, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content


def test_greedy_equals_transformers_generate(server: Server, answers: list[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(None)
    tokenizer, oracle = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    oracle.generation_config.eos_token_id = None
    for prompt, answer in list(zip(PROMPTS, answers, strict=True))[:4]:
        ids = tokenizer(prompt, return_tensors="pt")
        tokens = oracle.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


class NoSubmit:
    """A handle that takes no requests."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        assert name != "submit"
        return getattr(self._handle, name)


async def test_an_ingress_on_another_node_has_serve_alone_and_one_of_this_node_submits_past_it(
    server: Server, client: openai.AsyncOpenAI
) -> None:
    text = TextModel(resolve_model(None))
    prompt = text.encode(PROMPTS[0], add_special_tokens=False)
    # It listens nowhere for tokens.
    calls = ServeCalls(server.router)
    ingress = RouterClient(calls, Timeouts(), max_open=1)

    async def tokens_of(name: str) -> list[int]:
        sampling = SamplingParams(max_tokens=20, temperature=0.0, seed=0)
        queue = asyncio.Queue[TokenChunk]()
        request = Request(id=name, prompt_token_ids=tuple(prompt), sampling=sampling, slo_class="normal")
        await ingress.submit(request, queue)
        tokens: list[int] = []
        while len(tokens) < 20:
            tokens += (await asyncio.wait_for(queue.get(), 60)).token_ids
        return tokens

    answer = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    assert text.decode(await tokens_of("by Serve")) == answer.choices[0].text
    calls._handle = NoSubmit(server.router)
    assert text.decode(await tokens_of("past Serve")) == answer.choices[0].text
    calls.close()


def test_errors_of_each_kind(server: Server) -> None:
    client = server.client
    with pytest.raises(openai.BadRequestError, match="2049 tokens; the context holds 2048"):
        client.completions.create(model=MODEL, prompt=[5] * 2049)
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here"):
        client.completions.create(model="gpt-5", prompt="hi")
    with pytest.raises(openai.BadRequestError, match="unknown field speed"):
        client.completions.create(model=MODEL, prompt="hi", extra_body={"speed": 1})


async def test_429_when_max_queued_of_a_class_wait(server: Server, client: openai.AsyncOpenAI) -> None:
    long = [asyncio.create_task(stream_text(client, prompt, max_tokens=60)) for prompt in PROMPTS * (SLOTS // len(PROMPTS))]
    while (await server.status())["load"]["num_running"] < SLOTS:
        await asyncio.sleep(0.05)
    bounded = {"extra_body": {"max_tokens": 2}, "extra_headers": {"X-SLO-Class": "bounded"}}
    waiting = [asyncio.create_task(client.completions.create(model=MODEL, prompt="Hi", **bounded)) for _ in range(2)]
    while (await server.status())["load"]["num_waiting"] < 2:
        await asyncio.sleep(0.02)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model=MODEL, prompt="Hi", **bounded)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    # The official client comes back by itself, when it was told to.
    patient = client.with_options(max_retries=5)
    answer = await patient.completions.create(model=MODEL, prompt="Hi", **bounded)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    await asyncio.gather(*long, *waiting)


async def test_32_streams_of_different_lengths(server: Server, client: openai.AsyncOpenAI, answers: list[str]) -> None:

    async def one(index: int) -> str:
        await asyncio.sleep(0.03 * index)
        text, _ = await stream_text(client, PROMPTS[index % 8], max_tokens=5 + index)
        return text

    texts = await asyncio.gather(*(one(index) for index in range(32)))
    for index, text in enumerate(texts):
        answer = answers[index % 8]
        assert text.startswith(answer) or answer.startswith(text)


async def test_sampling_with_a_seed_repeats_itself_alone_and_in_a_crowd(server: Server, client: openai.AsyncOpenAI) -> None:
    fields = {"max_tokens": 20, "temperature": 1.0}
    alone = [(await stream_text(client, prompt, seed=n, **fields))[0] for n, prompt in enumerate(PROMPTS[:3])]
    crowd = await asyncio.gather(*(stream_text(client, p, seed=n, **fields) for n, p in enumerate(PROMPTS)))
    assert [text for text, _ in crowd[:3]] == alone


async def test_a_prompt_longer_than_a_step_is_answered_alone(client: openai.AsyncOpenAI) -> None:
    prompt = [n % 1000 + 100 for n in range(1200)]
    answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1200, 4)


async def test_a_client_that_leaves_frees_its_sequence_within_two_steps(
    server: Server, replica_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = await _steps_after_leaving(server, replica_url)
    with capsys.disabled():
        print(f"\nsteps between leaving and free blocks, the one under way included: {steps}")
    assert sorted(steps)[1] <= 2, "the client side takes a step more now and then, not as a rule"


async def test_haproxy_notices_a_client_that_leaves(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    steps = await _steps_after_leaving(server, server.url)
    with capsys.disabled():
        print(f"\nsteps between leaving and free blocks through HAProxy: {steps}")
    # It does not hear of every connection that was closed, but finds out when it writes the second time.
    assert sorted(steps)[1] <= 4, "the client side takes a step more now and then, not as a rule"


async def _steps_after_leaving(server: Server, url: str) -> list[int]:
    steps = []
    async with Server(url).async_client() as client:
        for leave_after in (1, 2, 4, 8):
            before = await server.status()
            stream = await client.completions.create(
                model=MODEL, prompt="Hi", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
            )
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == leave_after:
                    break
            left = await server.status()
            await stream.close()
            await asyncio.to_thread(server.check_idle)
            after = await server.status()
            assert after["stats"]["finished"]["abort"] == before["stats"]["finished"].get("abort", 0) + 1
            assert after["load"]["kv_cache_usage"] == 0
            steps.append(after["stats"]["steps"] - left["stats"]["steps"])
    return steps


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_whose_time_is_over_ends_with_what_there_is(client: openai.AsyncOpenAI, stream: bool) -> None:
    """Serve knows the header, too, and would cut the connection."""
    answer: Any = await client.completions.create(
        model=MODEL,
        prompt="Once upon a time",
        max_tokens=400,
        stream=stream,
        extra_body={"ignore_eos": True},
        extra_headers={"x-request-timeout-seconds": "1"},
    )
    pieces = [piece async for piece in answer] if stream else [answer]
    assert "".join(piece.choices[0].text for piece in pieces)
    last = pieces[-1].choices[0]
    assert (last.finish_reason, last.stop_reason) == ("length", "deadline")


async def test_a_critical_request_takes_a_slot_and_the_displaced_one_completes(
    server: Server, client: openai.AsyncOpenAI, answers: list[str]
) -> None:
    normal = [asyncio.create_task(stream_text(client, PROMPTS[n % 8], max_tokens=40)) for n in range(SLOTS)]
    while (await server.status())["load"]["num_running"] < SLOTS:
        await asyncio.sleep(0.02)
    before = (await server.status())["stats"]
    stream = await client.completions.create(
        model=MODEL, prompt="Stop!", max_tokens=3, stream=True, extra_headers={"X-SLO-Class": "critical"}
    )
    async for _ in stream:
        first_token_steps = (await server.status())["stats"]["steps"] - before["steps"]
        break
    async for _ in stream:
        pass
    assert first_token_steps <= 10
    assert (await server.status())["stats"]["preemptions"] > before["preemptions"]
    for n, (text, _) in enumerate(await asyncio.gather(*normal)):
        assert text == answers[n % 8]


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        ("draft", "kill"),
        ("verifier", "kill"),
        # Half a minute each, to notice.
        pytest.param("draft", "hang", marks=pytest.mark.slow),
        pytest.param("verifier", "hang", marks=pytest.mark.slow),
    ],
)
async def test_a_model_process_that_dies_or_hangs_costs_no_stream(
    server: Server,
    client: openai.AsyncOpenAI,
    answers: list[str],
    victim: str,
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pid = (await server.processes())[victim]
    streams = [asyncio.create_task(stream_text(client, prompt, max_tokens=40)) for prompt in PROMPTS]
    while (await server.status())["load"]["num_running"] < 8:
        await asyncio.sleep(0.02)
    os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    results = await asyncio.gather(*streams)
    assert [text for text, _ in results] == answers
    pause = max(later - earlier for _, times in results for earlier, later in pairwise(times))
    with capsys.disabled():
        print(f"\n{victim} {how}: 8 of 8 streams complete with the same text, longest pause {pause:.2f} s")
    deadline = time.monotonic() + 60
    while await _pid(server, victim) in (pid, None):
        assert time.monotonic() < deadline, f"the {victim} is not back"
        # The streams may have ended before the draft's silence was long enough: then a later request notices it.
        await stream_text(client, PROMPTS[0], max_tokens=4)
        await asyncio.sleep(0.2)


async def _pid(server: Server, process: str) -> int | None:
    try:
        return (await server.processes())[process]
    except RayError:
        return None  # on its way back


def test_a_second_turn_finds_the_first_until_its_session_is_deleted(server: Server) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea, and begin with its colour."}]

    def turn() -> tuple[int, int]:
        """Tokens of the prompt, and how many of them were found."""
        answer = server.client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=32, extra_headers={"X-Session-ID": "sea"}
        )  # type: ignore[call-overload]
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append({"role": "user", "content": "Go on."})
        return answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens

    first, _ = turn()
    _, cached = turn()
    assert cached >= first
    deleted = httpx.delete(f"{server.url}/v1/sessions/sea").json()
    assert deleted["kv_blocks"] > 0
    assert turn()[1] == 0


async def test_two_turns_over_one_websocket(client: openai.AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        answers: list[Any] = []
        for text in ("Tell me about the moon, and begin with its colour.", "Go on."):
            previous = {"previous_response_id": answers[-1].id} if answers else {}
            await connection.response.create(model=MODEL, input=text, max_output_tokens=32, temperature=0, **previous)
            async for event in connection:
                if event.type in ("response.completed", "response.incomplete"):
                    answers.append(event.response)
                    break
    first, second = answers
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens


@pytest.mark.parametrize("how", ["cancel", "drop"])
async def test_a_websocket_that_is_cancelled_or_dropped_frees_its_sequence(
    server: Server, client: openai.AsyncOpenAI, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = []
    for _ in range(4):
        async with client.responses.connect() as connection:
            story = {"input": "Tell me a long story.", "max_output_tokens": 1500, "temperature": 0}
            await connection.response.create(model=MODEL, **story)
            while (await connection.recv()).type != "response.output_text.delta":
                pass
            left = await server.status()
            if how == "cancel":
                await connection.send_raw('{"type": "response.cancel"}')
                await asyncio.to_thread(server.check_idle)
        await asyncio.to_thread(server.check_idle)
        steps.append((await server.status())["stats"]["steps"] - left["stats"]["steps"])
    with capsys.disabled():
        print(f"\nsteps between {how} and free blocks over a WebSocket, the one under way included: {steps}")
    assert sorted(steps)[2] <= 4, "the client side takes a step more now and then, not as a rule"
