"""The HTTP edge over an engine in the same process: everything but Ray and the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import uvicorn
from fakes import FakeExecutor, engine_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tailserve.cluster.config import Timeouts, parse_config
from tailserve.deployments.client import RouterClient
from tailserve.deployments.http import create_app
from tailserve.deployments.loop import EngineLoop
from tailserve.deployments.service import Service
from tailserve.deployments.streams import Outboxes
from tailserve.deployments.text import TextModel
from tailserve.engine.engine import Engine
from tailserve.engine.errors import TailserveError
from tailserve.engine.types import Batch, ModelInfo, Request

MODEL = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must be first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory: Path) -> Path:
    """A tokenizer of single bytes; ids below 94 are printable ASCII."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 255}))
    return directory


class PacedExecutor(FakeExecutor):
    """A fake executor whose steps take a moment, so that a client can act between them."""

    step_s = 0.0

    def submit(self, batch: Batch) -> None:
        import time

        time.sleep(self.step_s)
        super().submit(batch)


class LocalCalls:
    """The router deployment's methods over a loop in this process."""

    def __init__(self, **config: Any) -> None:
        settings = engine_config(**({"max_model_len": 128, "num_blocks": 256, "max_num_seqs": 8} | config))
        self.executor = PacedExecutor(settings)
        self.engine = Engine(settings, self.executor)
        self.outboxes = Outboxes()
        self.loop = EngineLoop(self.engine, settings.classes, self.outboxes.publish)
        self.aborted: list[str] = []

    async def submit(self, request: bytes, ingress: str, **_: Any) -> tuple[str, TailserveError | None]:
        try:
            self.loop.submit(msgspec.msgpack.decode(request, type=Request), ingress)
        except TailserveError as error:
            return "here", error
        self.outboxes.open_request(ingress)
        return "here", None

    async def stream(self, ingress: str, *, instance: str) -> AsyncIterator[bytes]:
        async for data in self.outboxes.read(ingress):
            yield data

    async def abort(self, request_ids: list[str], *, instance: str) -> None:
        self.aborted += request_ids
        self.loop.abort(request_ids)

    async def drop_session(self, tenant: str, session_id: str) -> int:
        return await asyncio.wrap_future(self.loop.drop_session(tenant, session_id))

    async def status(self) -> dict[str, Any]:
        return {}


class Edge:
    def __init__(
        self, directory: Path, *, ready: bool = True, settings: dict[str, Any] | None = None, **config: Any
    ) -> None:
        """`settings`: of the deployment; `config`: of the engine."""
        self.calls = LocalCalls(**config)
        self.router = RouterClient(self.calls, Timeouts(submit_s=5.0, carry_s=0.2), max_open=200)
        text = TextModel(write_tokenizer(directory))
        self.service = Service(parse_config(settings or {}), text, self.router, MODEL)
        if ready:
            self.service.model_info = ModelInfo(
                vocab_size=256,
                max_model_len=128,
                num_blocks=256,
                block_size=4,
                kv_bytes_per_token=1,
                attention_backend="fake",
                device="cpu",
            )
        self.app = create_app(self.service)

    async def open(self) -> None:
        """Serves on a loopback port: httpx's own ASGI transport does not stream."""
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning", lifespan="off"))
        self._serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.http = httpx.AsyncClient(base_url=url)
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", http_client=self.http, max_retries=0)

    async def close(self) -> None:
        await self.http.aclose()
        self._server.should_exit = True
        await self._serving
        await asyncio.to_thread(self.calls.loop.stop)

    async def settle(self) -> None:
        """Waits until the engine is idle, and checks that nothing was left behind."""
        assert await asyncio.to_thread(self.calls.loop.wait_idle, 10.0)
        self.calls.engine.check_integrity()
        assert self.calls.engine.gauges().num_running == 0
