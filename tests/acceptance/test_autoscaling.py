"""From one instance to three and back under a load step, on real Ray, by our policy and by Serve's default one. Slow."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from harness import local_ray
from ray import serve
from tiny import save_tiny

from tailserve.cluster.config import parse_config
from tailserve.deployments import router
from tailserve.deployments.app import build_app

TTFT_S, TOKENS = 1.0, 30
QUIET_S, STEP_S = 10.0, 70.0


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    slow = {"worker_process_setup_hook": "slow_steps.install", "env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    with local_ray(num_cpus=16, runtime_env=slow) as port:
        yield port


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": save_tiny(tmp_path_factory.mktemp("tiny")),
        "dtype": "float32",
        "served_model_name": "tiny",
        "speculation": "off",
        "cpu_threads": 1,
        "max_num_seqs": 2,
        "autoscaling": {"min_instances": 1, "max_instances": 3, "downscale_delay_s": 10},
        "slo_classes": [
            {"name": "critical", "priority": 0, "ttft_s": TTFT_S, "tpot_s": 0.3},
            {"name": "normal", "priority": 10, "ttft_s": 30.0, "tpot_s": 1.0},
        ],
    }


@pytest.fixture(scope="module")
def capacity(port: int, config: dict[str, Any]) -> float:
    """Requests a second of one instance that stays alone, and is never idle."""
    serve.run(build_app(parse_config(config | {"autoscaling": None})), name="alone", route_prefix="/alone")
    found = asyncio.run(_capacity(f"http://127.0.0.1:{port}/alone/v1"))
    serve.delete("alone")
    return found


@pytest.mark.parametrize("policy", ["tailserve", "default"])
async def test_a_load_step(
    port: int, config: dict[str, Any], policy: str, capacity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if policy == "default":
        scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2, "downscale_delay_s": 10}
        monkeypatch.setattr(router, "_scale", lambda _: {"autoscaling_config": scaling})
    await asyncio.to_thread(serve.run, build_app(parse_config(config)), name=policy, route_prefix=f"/{policy}")
    began, instances = time.monotonic(), [(0.0, 1)]
    watching = asyncio.create_task(_watch(policy, instances, began))
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/{policy}/v1", api_key="-", max_retries=0) as client:
        quiet = await _load(client, 0.4 * capacity, QUIET_S)
        begin = time.monotonic() - began
        step = await _load(client, 1.4 * capacity, STEP_S)
        end = time.monotonic() - began
        while time.monotonic() - began < end + 60 and instances[-1][1] > 1:
            await asyncio.sleep(0.5)
    watching.cancel()
    most = max(count for _, count in instances)
    changes = ", ".join(f"{count} after {at - begin:.0f} s" for at, count in instances[1:])
    late = [ttft for at, ttft in step if at > STEP_S / 2]
    print(
        f"\n{policy}: an instance does {capacity:.1f} requests/s; critical requests in time before the step "
        f"{_met(quiet):.0f}%, in it {_met(step):.0f}%, in its second half "
        f"{100 * statistics.mean(ttft <= TTFT_S for ttft in late):.0f}%; instances: {changes or 'always 1'}"
    )
    await asyncio.to_thread(serve.delete, policy)
    if policy == "tailserve":
        assert most == 3
        assert instances[-1][1] == 1


def _met(answers: list[tuple[float, float]]) -> float:
    return 100 * statistics.mean(ttft <= TTFT_S for _, ttft in answers)


async def _capacity(url: str) -> float:
    """Measured until it grows no more, since a new instance is slow."""
    before = 0.0
    async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
        while True:
            begin = time.monotonic()
            await asyncio.gather(*(_answer(client) for _ in range(16)))
            rate = 16 / (time.monotonic() - begin)
            if rate < 1.1 * before:
                return max(rate, before)
            before = rate


async def _load(client: openai.AsyncOpenAI, rate: float, seconds: float) -> list[tuple[float, float]]:
    """When each request came, and how long its first token took; all of them complete."""
    begin, tasks = time.monotonic(), []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(begin + number / rate - time.monotonic(), 0))
        tasks.append((time.monotonic() - begin, asyncio.create_task(_answer(client))))
    return [(at, await task) for at, task in tasks]


async def _answer(client: openai.AsyncOpenAI) -> float:
    begin, first, tokens = time.monotonic(), None, 0
    stream = await client.completions.create(
        model="tiny",
        prompt="Once upon a time",
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "service_tier": "priority"},
    )
    async for chunk in stream:
        first = first or time.monotonic()
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    assert tokens == TOKENS
    assert first is not None
    return first - begin


async def _watch(application: str, instances: list[tuple[float, int]], began: float) -> None:
    while True:
        status = await asyncio.to_thread(serve.status)
        count = status.applications[application].deployments["Router"].replica_states.get("RUNNING", 0)
        if count != instances[-1][1]:
            instances.append((time.monotonic() - began, count))
        await asyncio.sleep(0.5)
