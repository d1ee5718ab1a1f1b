"""Responses that go on whether or not anybody reads them, and readers that come back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import NamedTuple

from tailserve.deployments.response_events import ResponseObject, response_events, server_sent
from tailserve.engine.errors import NotFoundError

logger = logging.getLogger(__name__)

KEPT_S = 300.0
"""How long the events of a response that has ended can be read again."""
MAX_BYTES = 64 << 20
"""Of the events of all that have ended. Beyond it the tenant that has most loses its oldest."""


class EventLog:
    """The events of one response. Any number of readers may follow it, each from a place of its own."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._grown = asyncio.Event()
        self.num_bytes = 0
        self.ended_at: float | None = None
        """By the monotonic clock; None while it grows."""

    def append(self, event: bytes) -> None:
        self._events.append(event)
        self.num_bytes += len(event)
        self._wake()

    def end(self) -> None:
        self.ended_at = time.monotonic()
        self._wake()

    async def read(self, after: int) -> AsyncIterator[bytes]:
        """Events behind number `after` (-1: all), until the last."""
        position = max(after, -1) + 1
        while True:
            if position < len(self._events):
                begin, position = position, len(self._events)
                yield b"".join(self._events[begin:position])
            elif self.ended_at is not None:
                return
            else:
                await self._grown.wait()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


class Entry(NamedTuple):
    response: ResponseObject
    log: EventLog


class Background:
    """What goes on in this process, and what has lately ended, by tenant and response."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, tenant: str, response: ResponseObject) -> EventLog:
        """Runs a response to its end, whoever reads it."""
        log = EventLog()
        self._entries[tenant, response.id] = Entry(response, log)

        async def follow() -> None:
            try:
                async for event in server_sent(response_events(response)):
                    log.append(event)
            finally:
                response.generation.close()
                log.end()
                self._forget_old()
                asyncio.get_running_loop().call_later(KEPT_S + 1, self._forget_old)

        task = asyncio.create_task(follow(), name=f"background {response.id}")
        # The event loop keeps weak references only.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return log

    def find(self, tenant: str, response_id: str) -> Entry | None:
        return self._entries.get((tenant, response_id))

    def log(self, tenant: str, response_id: str) -> EventLog:
        """NotFoundError if a tenant has no such response in the background (any more)."""
        entry = self.find(tenant, response_id)
        if entry is None:
            raise NotFoundError(
                f"no events of {response_id!r} are kept here: ask for background=true, and come back within {KEPT_S:g} s",
                param="response_id",
            )
        return entry.log

    def drop(self, tenant: str, response_id: str) -> None:
        """Forgets a response, and ends it where it goes on."""
        entry = self._entries.pop((tenant, response_id), None)
        if entry is not None and entry.log.ended_at is None:
            entry.response.on_end = None
            entry.response.generation.abort()

    def drop_session(self, tenant: str, session_id: str) -> None:
        """Forgets a session's responses. Those that run go on for their readers, and are not stored."""
        for key, entry in list(self._entries.items()):
            if key[0] == tenant and entry.response.session_id == session_id:
                entry.response.on_end = None
                del self._entries[key]

    async def finish(self) -> None:
        """Waits for what goes on."""
        if self._tasks:
            logger.info("%d responses go on in the background", len(self._tasks))
            await asyncio.wait(self._tasks)

    def _forget_old(self) -> None:
        ended = sorted(
            ((log.ended_at, key) for key, (_, log) in self._entries.items() if log.ended_at is not None),
            key=lambda entry: entry[0],
        )
        sizes: Counter[str] = Counter()
        for _, key in ended:
            sizes[key[0]] += self._entries[key].log.num_bytes
        horizon = time.monotonic() - KEPT_S
        while ended:
            oldest = next((key for ended_at, key in ended if ended_at < horizon), None)
            if oldest is None and sizes.total() > MAX_BYTES:
                most = max(sizes, key=sizes.__getitem__)
                oldest = next(key for _, key in ended if key[0] == most)
            if oldest is None:
                return
            sizes[oldest[0]] -= self._entries.pop(oldest).log.num_bytes
            ended = [entry for entry in ended if entry[1] != oldest]
