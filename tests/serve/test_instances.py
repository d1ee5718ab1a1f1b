"""Two instances of a tiny model, each with a draft model of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from harness import PROMPTS
from ray import serve
from tiny import TINY, save_model

from tailserve.cluster.config import parse_config
from tailserve.deployments.app import build_app
from tailserve.deployments.models import resolve_model

NAME = "two"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("tiny")
    path = save_model(LlamaConfig(**(TINY | {"vocab_size": 49152})), directory)
    shutil.copy(resolve_model(None) / "tokenizer.json", directory)
    return path


@pytest.fixture(scope="module")
def url(ray_cluster: int, model: str) -> Iterator[str]:
    config: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "served_model_name": "tiny",
        "draft_model": model,
        "draft_noise": 0.01,
        "speculation": 4,
        "num_instances": 2,
        "cpu_threads": 1,
        "max_num_seqs": 4,
        "timeouts": {"draft_s": 1.0},
    }
    serve.run(build_app(parse_config(config)), name=NAME, route_prefix=f"/{NAME}")
    yield f"http://127.0.0.1:{ray_cluster}/{NAME}"
    serve.delete(NAME)


async def test_both_instances_answer_and_the_draft_model_agrees_some_of_the_time(url: str, model: str) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

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
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    oracle.generation_config.eos_token_id = None
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    for prompt, response in list(zip(PROMPTS, responses, strict=False))[:3]:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        tokens = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert response.choices[0].text == tokenizer.decode(tokens[0, ids.shape[1] :].tolist())
    details = [response.usage.completion_tokens_details for response in responses if response.usage]
    assert sum(detail.accepted_prediction_tokens or 0 for detail in details if detail) > 50
    assert len(await _instances()) == 2


async def test_a_session_finds_its_blocks_whichever_instance_has_them(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        chats = await asyncio.gather(*(Chat(client, f"session {number}").hold(5) for number in range(8)))
    for chat in chats:
        for (before, _), (_, cached) in pairwise(chat.seen):
            assert cached >= before // 16 * 16
    hits = {name: status["stats"]["prefix_cache_hits"] for name, status in (await _instances()).items()}
    assert min(hits.values()) > 0


async def test_a_session_goes_on_elsewhere_when_its_instance_is_killed(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        before = {name: status["stats"]["prompt_tokens"] for name, status in (await _instances()).items()}
        chat = await Chat(client, "a session").hold(2)
        homes = [name for name, status in (await _instances()).items() if status["stats"]["prompt_tokens"] > before[name]]
        assert len(homes) == 1
        os.kill((await _instances())[homes[0]]["pid"], signal.SIGKILL)
        await chat.hold(2)
        alone = await Chat(client, None).hold(4)
    assert chat.text == alone.text
    cached = [cached for _, cached in chat.seen]
    assert cached[1] > 0, "its instance had it"
    assert cached[2] == 0, "the other did not"
    assert cached[3] > 0, "and now it has"


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
