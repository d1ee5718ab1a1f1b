"""Streams completions from a server and notes when each piece arrived."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

READ_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Workload:
    """One kind of request. Prompts are random token ids, so that no server finds one in its cache."""

    name: str
    prompt_tokens: int
    output_tokens: int
    share: float = 1.0
    """Of the arrivals of an open loop."""
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, object] = field(default_factory=dict)
    """Further fields of the request."""
    vocab_size: int = 10_000

    def request(self, chance: random.Random) -> dict[str, object]:
        return {
            "prompt": [chance.randrange(self.vocab_size) for _ in range(self.prompt_tokens)],
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            **self.body,
        }


@dataclass
class Sample:
    """One request as its client saw it. Seconds on the client's clock."""

    workload: str
    sent: float
    pieces: list[float] = field(default_factory=list)
    """When each piece of the answer's text arrived."""
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.pieces[0] - self.sent

    @property
    def tpot(self) -> float:
        """Seconds per token behind the first; 0 for an answer of one token."""
        return (self.pieces[-1] - self.pieces[0]) / max(self.num_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    delta: _Delta | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class Client:
    """One server. Use as an asynchronous context."""

    def __init__(
        self, url: str, model: str | None = None, *, api_key: str = "", read_timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        """`read_timeout_s`: a stream that is silent for this long has failed."""
        self._read_timeout_s = read_timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/").removesuffix("/v1")
        self._model = model

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=self._read_timeout_s)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0), headers=self._headers
        )
        try:
            if self._model is None:
                async with self._session.get(f"{self.url}/v1/models") as response:
                    response.raise_for_status()
                    self._model = (await response.json())["data"][0]["id"]
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def stream(
        self,
        body: dict[str, object],
        *,
        workload: str = "",
        path: str = "completions",
        headers: dict[str, str] | None = None,
    ) -> Sample:
        """Sends one request and reads its answer to the end. What went wrong is in the sample's `error`."""
        full = {"model": self._model, "stream": True, "stream_options": {"include_usage": True}} | body
        sample = Sample(workload, time.perf_counter())
        try:
            async with self._session.post(f"{self.url}/v1/{path}", json=full, headers=headers) as response:
                if response.status != 200:
                    sample.error = f"{response.status}: {(await response.text())[:200]}"
                    return sample
                rest = b""
                async for data in response.content.iter_any():
                    now = time.perf_counter()
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        self._take(event, now, sample)
        except (aiohttp.ClientError, TimeoutError) as error:
            sample.error = f"{type(error).__name__}: {error}"
        if not sample.pieces and sample.error is None:
            sample.error = "the answer was empty"
        return sample

    @staticmethod
    def _take(event: bytes, now: float, sample: Sample) -> None:
        data = event.partition(b"data:")[2].strip()
        if not data or data == b"[DONE]":
            return
        decoded = _decode(data)
        if decoded.error is not None:
            sample.error = str(decoded.error)
        if decoded.usage is not None:
            sample.num_tokens = decoded.usage.completion_tokens
            sample.prompt_tokens = decoded.usage.prompt_tokens
            sample.cached_tokens = (decoded.usage.prompt_tokens_details or _PromptDetails()).cached_tokens or 0
        for choice in decoded.choices:
            # Events without text are nothing to read: a chat's opening one, its end, and those that some servers send for
            # tokens that are but a part of a character.
            text = choice.delta.content if choice.delta is not None else choice.text
            if text:
                sample.text += text
                sample.pieces.append(now)


async def closed_loop(client: Client, workload: Workload, *, concurrency: int, requests: int, seed: int) -> list[Sample]:
    """`concurrency` users, each sending its next request when the last one is answered."""
    chance = random.Random(seed)
    bodies = iter([workload.request(chance) for _ in range(requests)])
    samples: list[Sample] = []

    async def user() -> None:
        for body in bodies:
            sample = await client.stream(body, workload=workload.name, headers=workload.headers)
            samples.append(sample)

    await asyncio.gather(*(user() for _ in range(concurrency)))
    return samples


async def open_loop(
    client: Client, workloads: Sequence[Workload], *, rate: float, duration_s: float, seed: int, drain_s: float | None = None
) -> list[Sample]:
    """Poisson arrivals at `rate` requests a second, whether or not the server keeps up.

    Waits for every answer, or for `drain_s` seconds after the last arrival: what has not ended by then is given up, and has
    failed.
    """
    chance = random.Random(seed)
    tasks: dict[asyncio.Task[Sample], tuple[Workload, float]] = {}
    begin, due = time.perf_counter(), 0.0
    while (due := due + chance.expovariate(rate)) < duration_s:
        workload = chance.choices(workloads, [w.share for w in workloads])[0]
        body = workload.request(chance)
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        task = asyncio.create_task(client.stream(body, workload=workload.name, headers=workload.headers))
        tasks[task] = workload, time.perf_counter()
    _, late = await asyncio.wait(tasks, timeout=drain_s) if tasks else (set(), set())
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
    given_up = f"no end within {drain_s} s of the last arrival"
    return [
        Sample(workload.name, sent, error=given_up) if task in late else task.result()
        for task, (workload, sent) in tasks.items()
    ]
