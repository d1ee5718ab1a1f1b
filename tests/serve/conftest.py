"""Real Ray and the real demo model, started once for all tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest
from harness import CONFIG, MODEL, Server, local_ray, undisturbed
from ray import serve

from tailserve.cluster.config import parse_config
from tailserve.deployments.app import build_app

REPLICA_PORTS = range(30500, 30520)
"""Serve gives the first that is free to the ingress replica."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[int]:
    """Ray and Serve on this machine alone; the port that Serve listens on."""
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(REPLICA_PORTS[0])
    with local_ray(num_cpus=8) as port:
        yield port


@pytest.fixture(scope="session")
def server(ray_cluster: int) -> Iterator[Server]:
    """The demo model in float32, where equal requests have equal answers."""
    server = Server(f"http://127.0.0.1:{ray_cluster}")
    app = build_app(parse_config(CONFIG))
    serve.run_many([serve.RunTarget(app, name="tailserve", route_prefix="/")], wait_for_applications_running=False)
    with server.client:
        _wait_until_it_answers(server)
        yield server


def _wait_until_it_answers(server: Server) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            server.client.completions.create(model=MODEL, prompt="Hi", max_tokens=1)
        except openai.APIStatusError as error:
            # 404 before the ingress is there at all.
            if error.status_code == 503:
                server.refused_while_loading = error
            time.sleep(0.1)
        except openai.APIConnectionError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the server did not come up")


@pytest.fixture
def replica_url(server: Server) -> str:
    """The ingress replica itself, without the proxy in front of it."""
    for port in REPLICA_PORTS:
        with contextlib.suppress(httpx.TransportError):
            if "version" in httpx.get(f"http://127.0.0.1:{port}/version").json():
                return f"http://127.0.0.1:{port}"
    raise LookupError("no ingress replica listens")


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with server.async_client() as client:
        yield client


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").check_idle()


@pytest.fixture(scope="session")
def answers(server: Server) -> list[str]:
    """What `PROMPTS` are answered when nothing disturbs them, 40 tokens each."""
    return asyncio.run(undisturbed(server, 40))
