"""A server under test, seen from outside and from inside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# A token file in the home directory would turn authentication on.
os.environ["RAY_AUTH_MODE"] = "disabled"

import openai
import ray
from ray import serve

from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.demo import NAME as MODEL

SLOTS = 16
CONFIG: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": SLOTS,
    "max_model_len": 2048,
    "timeouts": {"step_s": 12.0, "draft_hang_s": 2.0},
    "slo_classes": [
        # Targets that a slow machine can keep, so that all slots may be taken.
        {"name": "critical", "priority": 0, "ttft_s": 4.0, "tpot_s": 0.5},
        {"name": "normal", "priority": 10, "ttft_s": 60.0, "tpot_s": 5.0},
        {"name": "bounded", "priority": 20, "ttft_s": 60.0, "tpot_s": 5.0, "max_queued": 2},
    ],
}


@dataclass
class Server:
    """A running deployment, seen from outside and from inside."""

    url: str
    refused_while_loading: openai.APIStatusError | None = None

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        """To be closed by whoever asked for it."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=120)

    @property
    def router(self) -> Any:
        return serve.get_deployment_handle("Router", "tailserve")

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await asyncio.to_thread(lambda: self.router.status.remote().result())
        return status

    async def processes(self) -> dict[str, int]:
        pids: dict[str, int] = await asyncio.to_thread(lambda: self.router.processes.remote().result())
        return pids

    def check_idle(self) -> None:
        """Waits until nothing runs, then checks that all blocks are accounted for."""
        problem = self.router.check_idle_integrity.remote(60.0).result()
        assert problem is None, problem


async def stream_text(client: openai.AsyncOpenAI, prompt: str, **fields: Any) -> tuple[str, list[float]]:
    """The text of a streamed completion, and when each piece came."""
    extra = fields.pop("extra_body", {})
    stream = await client.completions.create(
        model=MODEL, prompt=prompt, stream=True, **({"temperature": 0.0} | fields), extra_body={"ignore_eos": True} | extra
    )
    text, times = "", []
    async for chunk in stream:
        assert chunk.choices, chunk
        text += chunk.choices[0].text
        times.append(time.monotonic())
    return text, times


@contextlib.contextmanager
def local_ray(num_cpus: int, **options: Any) -> Iterator[int]:
    """Ray and Serve on this machine alone; the port that Serve listens on. `options`: more of `ray.init`."""
    # As `tailserve serve` does, but for this process, where ray.serve is imported already: its handles are called from many
    # event loops, which Serve's throughput mode does not allow.
    prepare_serve()
    # Otherwise the first instances are slow until they have compiled.
    subprocess.run([sys.executable, "-m", "tailserve.engine.model.compiled", "float32", "none"], check=True)
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, **options)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "1, 2, 3, 4, 5, 6, 7,",
    "Q: What is photosynthesis?\nA:",
    "The three most important things in life are",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, humans first",
]


async def undisturbed(server: Server, max_tokens: int) -> list[str]:
    """What `PROMPTS` are answered one after the other."""
    async with server.async_client() as client:
        return [(await stream_text(client, prompt, max_tokens=max_tokens))[0] for prompt in PROMPTS]
