"""Two instances of a tiny model, each with a draft model of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import httpx
import openai
import pytest
from harness import PROMPTS
from ray import serve
from tiny import by_transformers, save_tiny

from tailserve.cluster.config import parse_config
from tailserve.deployments.app import build_app

NAME = "two"
LENGTH = 160
"""Of a stream: the first has not ended when the last begins, also where they begin late."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": "float32",
        "served_model_name": "tiny",
        "draft_model": model,
        "draft_noise": 0.01,
        "speculation": 4,
        "num_instances": 2,
        "cpu_threads": 1,
        "max_num_seqs": 16,
        "timeouts": {"draft_s": 1.0, "silence_s": 5.0},
        # All slots may be taken, however slow the machine.
        "slo_classes": [{"name": "normal", "priority": 10, "ttft_s": 60.0, "tpot_s": 5.0}],
        "urgent_class": "normal",
        "service_tiers": {},
        "default_class": "normal",
    }


@pytest.fixture(scope="module")
def url(ray_cluster: int, config: dict[str, Any]) -> Iterator[str]:
    serve.run(build_app(parse_config(config)), name=NAME, route_prefix=f"/{NAME}")
    yield f"http://127.0.0.1:{ray_cluster}/{NAME}"
    serve.delete(NAME)


async def test_both_instances_answer_and_the_draft_model_agrees_some_of_the_time(url: str, model: str) -> None:
    async with httpx.AsyncClient() as http:
        while (await http.get(f"{url}/ready")).status_code != 200:
            await asyncio.sleep(0.1)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        responses = await asyncio.gather(
            *(
                client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
                )
                for prompt in PROMPTS * 2
            )
        )
    expected = await asyncio.to_thread(by_transformers, model, PROMPTS[:3], 40)
    assert [response.choices[0].text for response in responses[:3]] == expected
    details = [response.usage.completion_tokens_details for response in responses if response.usage]
    assert sum(detail.accepted_prediction_tokens or 0 for detail in details if detail) > 50
    assert len(await _instances()) == 2


async def test_a_session_finds_its_blocks_whichever_instance_has_them(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        chats = await asyncio.gather(*(Chat(client, f"session {number}").hold(3) for number in range(16)))
    for chat in chats:
        for (before, _), (_, cached) in pairwise(chat.seen):
            assert cached >= before // 16 * 16
    hits = {name: status["stats"]["prefix_cache_hits"] for name, status in (await _instances()).items()}
    # With a chance of 3 in 100,000 all of them have the same home.
    assert min(hits.values()) > 0


async def test_streams_and_sessions_of_an_instance_that_is_killed_go_on_elsewhere(url: str) -> None:
    async with Streams(url) as streams, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        chats: dict[str, Chat] = {}
        while len(chats) < 2:
            before = {name: status["stats"]["prompt_tokens"] for name, status in (await _instances()).items()}
            chat = await Chat(client, f"session at {time.monotonic()}").hold(2)
            after = {name: status["stats"]["prompt_tokens"] for name, status in (await _instances()).items()}
            (home,) = (name for name in before if after[name] > before[name])
            chats[home] = chat
        await streams.begin()
        victim = max((await _instances()).values(), key=lambda status: status["load"]["num_running"])
        assert victim["load"]["num_running"] >= 4
        chat = chats[victim["instance"]]
        os.kill(victim["pid"], signal.SIGKILL)
        await streams.check()
        await chat.hold(2)
        alone = await Chat(client, None).hold(4)
    print(f"killed: the longest pause of 16 streams was {1000 * streams.longest_pause:.0f} ms")
    assert chat.text == alone.text
    cached = [cached for _, cached in chat.seen]
    assert cached[1] > 0, "its instance had it"
    assert cached[2] == 0, "the other did not"
    assert cached[3] > 0, "and now it has"


@pytest.mark.slow
async def test_streams_of_an_instance_that_falls_silent_go_on_elsewhere(url: str) -> None:
    async with Streams(url) as streams:
        await streams.begin()
        victim = max((await _instances()).values(), key=lambda status: status["load"]["num_running"])
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            await streams.check()
        finally:
            os.kill(victim["pid"], signal.SIGCONT)
    print(f"silent: the longest pause of 16 streams was {1000 * streams.longest_pause:.0f} ms")


class Streams:
    """Sixteen streams at once."""

    undisturbed: ClassVar[list[tuple[str, int]]] = []
    """What they are when nothing disturbs them."""

    def __init__(self, url: str) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120)
        self._tasks: list[asyncio.Task[tuple[str, int]]] = []
        self._begun = 0
        self.longest_pause = 0.0

    async def __aenter__(self) -> Streams:
        await _instances()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self._client.close()

    async def begin(self) -> None:
        """Returns when all of them have begun."""
        if not self.undisturbed:
            self.undisturbed.extend(await asyncio.gather(*map(self._answer, range(16))))
        self.longest_pause, self._begun = 0.0, 0
        self._tasks = [asyncio.create_task(self._answer(number)) for number in range(16)]
        while self._begun < 16:
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in self._tasks)

    async def check(self) -> None:
        """They end as they would have ended anyway."""
        assert await asyncio.gather(*self._tasks) == self.undisturbed

    async def _answer(self, number: int) -> tuple[str, int]:
        """The text, and the tokens that the usage counts. One is drawn by chance, with penalties."""
        chance = {"temperature": 0.8, "seed": number, "frequency_penalty": 0.5} if number == 1 else {"temperature": 0}
        stream = await self._client.completions.create(
            model="tiny",
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=LENGTH,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            **chance,  # type: ignore[arg-type]
        )
        text, tokens, last = "", 0, time.monotonic()
        async for chunk in stream:
            piece = chunk.choices[0].text if chunk.choices else ""
            self._begun += bool(piece) and not text
            self.longest_pause = max(self.longest_pause, time.monotonic() - last)
            last = time.monotonic()
            text += piece
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        assert tokens == LENGTH
        return text, tokens


class Chat:
    """A conversation of greedy answers."""

    def __init__(self, client: openai.AsyncOpenAI, session_id: str | None) -> None:
        self._client = client
        self._session = {} if session_id is None else {"session_id": session_id}
        self.text = "First comes one, and then comes two, and three, and four, and five, and six, and seven, and eight."
        self.seen: list[tuple[int, int]] = []
        """The tokens of each turn's prompt, and how many of them were found."""

    async def hold(self, turns: int) -> Chat:
        for _ in range(turns):
            fields = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True, **self._session}}
            answer = await self._client.completions.create(model="tiny", prompt=self.text, **fields)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            self.seen.append((answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens or 0))
            self.text += answer.choices[0].text + " and what then?"
        return self


async def _instances() -> dict[str, Any]:
    """Both instances' status, by name."""
    handle = serve.get_deployment_handle("Router", NAME)
    found: dict[str, Any] = {}
    while len(found) < 2:
        status = await handle.status.remote()
        found[status["instance"]] = status
    return found
