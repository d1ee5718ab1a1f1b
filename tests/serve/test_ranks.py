"""A model over two ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from harness import PROMPTS
from ray import serve
from tiny import by_transformers, save_tiny

from tailserve.cluster.config import parse_config
from tailserve.deployments.app import build_app

pytestmark = pytest.mark.slow

NAME = "ranks"
LENGTH = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["STRICT_PACK", "PACK"])
def url(ray_cluster: int, model: str, request: pytest.FixtureRequest) -> Iterator[str]:
    config: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "served_model_name": "tiny",
        "tensor_parallel_size": 2,
        "resources": {"placement": request.param},
        "num_kv_blocks": 200,
        "speculation": 3,
    }
    serve.run(build_app(parse_config(config)), name=NAME, route_prefix=f"/{NAME}")
    yield f"http://127.0.0.1:{ray_cluster}/{NAME}"
    serve.delete(NAME)


async def test_two_ranks_answer_like_one_also_when_one_of_them_dies(url: str, model: str) -> None:
    expected = await asyncio.to_thread(by_transformers, model, PROMPTS, LENGTH)
    router = serve.get_deployment_handle("Router", NAME)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        assert await asyncio.gather(*(_answer(client, prompt) for prompt in PROMPTS)) == expected
        before = await router.processes.remote()
        begun = asyncio.Event()
        tasks = [asyncio.create_task(_answer(client, prompt, begun)) for prompt in PROMPTS]
        await begun.wait()
        os.kill(before["verifier-1"], signal.SIGKILL)
        assert await asyncio.gather(*tasks) == expected
    after = await router.processes.remote()
    assert after.keys() == before.keys() == {"verifier", "verifier-1", "draft"}
    assert after["verifier"] != before["verifier"]
    assert (await router.status.remote())["stats"]["executor_restarts"] == 1


async def _answer(client: openai.AsyncOpenAI, prompt: str, begun: asyncio.Event | None = None) -> str:
    text = ""
    stream = await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=LENGTH, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for chunk in stream:
        text += chunk.choices[0].text
        if begun is not None:
            begun.set()
    return text
