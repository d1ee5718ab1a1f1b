"""Responses that go on whether or not anybody reads them, and readers that come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import NamedTuple

from tailserve.deployments.response_events import ResponseObject, response_events, server_sent
from tailserve.deployments.tenant_store import TenantStore
from tailserve.engine.errors import NotFoundError

logger = logging.getLogger(__name__)

KEPT_S = 300.0
"""How long the events of a response that has ended can be read again."""
MAX_BYTES = 64 << 20
"""Of the events of all that have ended."""


class EventLog:
    """The events of one response. Any number of readers may follow it, each from a place of its own."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._grown = asyncio.Event()
        self.num_bytes = 0
        self._ended = False

    def append(self, event: bytes) -> None:
        self._events.append(event)
        self.num_bytes += len(event)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    async def read(self, after: int) -> AsyncIterator[bytes]:
        """Events behind number `after` (-1: all), until the last."""
        position = max(after, -1) + 1
        while True:
            if position < len(self._events):
                begin, position = position, len(self._events)
                yield b"".join(self._events[begin:position])
            elif self._ended:
                return
            else:
                await self._grown.wait()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


class Entry(NamedTuple):
    response: ResponseObject
    log: EventLog

    @property
    def num_bytes(self) -> int:
        return self.log.num_bytes


class Background:
    """What goes on in this process, and what has lately ended, by tenant and response."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._running: dict[tuple[str, str], Entry] = {}
        self._ended: TenantStore[Entry] = TenantStore(max_bytes)
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, tenant: str, response: ResponseObject) -> EventLog:
        """Runs a response to its end, whoever reads it."""
        entry = self._running[tenant, response.id] = Entry(response, EventLog())
        task = asyncio.create_task(self._follow(tenant, entry), name=f"background {response.id}")
        # The event loop keeps weak references only.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return entry.log

    def find(self, tenant: str, response_id: str) -> Entry | None:
        return self._running.get((tenant, response_id)) or self._ended.find(tenant, response_id)

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
        self._ended.discard(tenant, response_id)
        running = self._running.pop((tenant, response_id), None)
        if running is not None:
            running.response.on_end = None
            running.response.generation.abort()

    def drop_session(self, tenant: str, session_id: str) -> None:
        """Forgets a session's responses. Those that run go on for their readers, and are not stored."""
        for name, entry in self._ended.of(tenant):
            if entry.response.session_id == session_id:
                self._ended.discard(tenant, name)
        for key, entry in list(self._running.items()):
            if key[0] == tenant and entry.response.session_id == session_id:
                entry.response.on_end = None
                del self._running[key]

    async def finish(self) -> None:
        """Waits for what goes on."""
        if self._tasks:
            logger.info("%d responses go on in the background", len(self._tasks))
            await asyncio.wait(self._tasks)

    async def _follow(self, tenant: str, entry: Entry) -> None:
        response, log = entry
        try:
            async for event in server_sent(response_events(response)):
                log.append(event)
        finally:
            response.generation.close()
            log.end()
            # Unless it was forgotten meanwhile.
            if self._running.pop((tenant, response.id), None) is not None:
                self._ended.keep(tenant, response.id, entry)
                asyncio.get_running_loop().call_later(KEPT_S, self._ended.discard, tenant, response.id)
