"""Requests past Ray, from an ingress to a router on its node: through a socket file that the router binds.

Serve asks a replica whether it takes a call before it passes the answer on: 5 ms of a first token, where this takes less
than one. Streams of the kernel's, not ZeroMQ's: who waits for an answer must hear at once that the other end is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from tailserve.engine import errors
from tailserve.engine.errors import NotReadyError, TailserveError

logger = logging.getLogger(__name__)

HEADER = 4
"""Bytes of a message's length, the lowest first, before the message."""


class Submission(msgspec.Struct, frozen=True, array_like=True):
    """A request on its way to a router."""

    request: bytes
    """An encoded `Request`."""
    ingress: str
    tokens_at: str
    """Where the ingress listens."""


Refusal = tuple[str, str, dict[str, Any]]
"""An error's class, message and attributes. Replies are one each, or None, in the order of the submissions."""


class _Messages(asyncio.Protocol):
    """Either end of a connection: whole messages out of what comes in pieces."""

    def __init__(self, handler: Callable[[_Messages, bytes], None], lost: Callable[[_Messages], None]) -> None:
        self._handler = handler
        self._lost = lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        begin = 0
        while (body := begin + HEADER) <= len(self._buffer):
            end = body + int.from_bytes(self._buffer[begin:body], "little")
            if end > len(self._buffer):
                break
            try:
                self._handler(self, bytes(self._buffer[body:end]))
            except Exception:
                # Whoever waits for an answer is told by the end of the connection.
                logger.exception("a message could not be handled; its connection ends")
                self.close()
                return
            begin = end
        del self._buffer[:begin]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost(self)

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Submission | Refusal | None) -> None:
        """ConnectionError when the other end is gone."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is gone")
        data = msgspec.msgpack.encode(message)
        self._transport.write(len(data).to_bytes(HEADER, "little") + data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class RequestInlet:
    """A router's end, on its event loop."""

    def __init__(self, address: Path, accept: Callable[[bytes, str, str], TailserveError | None]) -> None:
        """`address`: a file that is not there yet. `accept`: gets `Submission`'s fields; returns why it refuses, if so."""
        self.address = str(address)
        self._accept = accept
        self._ends: set[_Messages] = set()
        self._decoder = msgspec.msgpack.Decoder(Submission)

    async def open(self) -> None:
        self._server = await asyncio.get_running_loop().create_unix_server(self._connect, self.address)

    def _connect(self) -> _Messages:
        end = _Messages(self._take, self._ends.discard)
        self._ends.add(end)
        return end

    def _take(self, end: _Messages, data: bytes) -> None:
        asked = self._decoder.decode(data)
        try:
            error = self._accept(asked.request, asked.ingress, asked.tokens_at)
        except Exception as accident:
            # The others on this connection have nothing to do with it.
            logger.exception("a request of ingress %s could not be taken in", asked.ingress)
            error = NotReadyError(f"the request could not be taken in: {type(accident).__name__}")
        refusal: Refusal | None = None if error is None else (type(error).__name__, error.message, vars(error))
        # An ingress that is gone meanwhile reads no tokens, either: `Outboxes.orphans` gives its requests up.
        with contextlib.suppress(ConnectionError):
            end.send(refusal)

    def close(self) -> None:
        self._server.close()
        for end in list(self._ends):
            end.close()


class RequestOutlets:
    """An ingress's ends, by instance, on its event loop."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def reach(self, instance: str) -> bool:
        """Whether `submit` may be asked to go there."""
        line = self._lines.get(instance)
        return line is not None and line.end.is_open

    async def connect(self, instance: str, address: str) -> None:
        """Reaches an instance from now on, if it listens on this node."""
        if instance in self._lines:
            return
        line = self._lines[instance] = _Line(lambda: self._forget(instance))
        try:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().create_unix_connection(lambda: line.end, address)
        finally:
            if not line.end.is_open:
                self._forget(instance)

    async def submit(self, instance: str, request: bytes, ingress: str, tokens_at: str) -> TailserveError | None:
        """Why the instance did not take the request; None if it did."""
        try:
            return await self._lines[instance].ask(request, ingress, tokens_at)
        except ConnectionError as error:
            # Had it taken the request, it is asked for no more.
            return NotReadyError(f"the instance died before it took the request; try again ({error})")

    def _forget(self, instance: str) -> None:
        self._lines.pop(instance, None)

    def close(self) -> None:
        for line in self._lines.values():
            line.end.close()


class _Line:
    """A connection to one instance, and what was asked there."""

    def __init__(self, lost: Callable[[], object]) -> None:
        self.end = _Messages(self._take, self._fail)
        self._lost = lost
        self._asked: deque[asyncio.Future[TailserveError | None]] = deque()
        """What has no reply yet, the oldest first."""
        self._decoder: msgspec.msgpack.Decoder[Refusal | None] = msgspec.msgpack.Decoder(Refusal | None)

    async def ask(self, request: bytes, ingress: str, tokens_at: str) -> TailserveError | None:
        self.end.send(Submission(request, ingress, tokens_at))
        answer: asyncio.Future[TailserveError | None] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        return await answer

    def _take(self, _: _Messages, data: bytes) -> None:
        refusal, answer = self._decoder.decode(data), self._asked.popleft()
        if not answer.done():
            answer.set_result(None if refusal is None else _error(*refusal))

    def _fail(self, _: _Messages) -> None:
        self._lost()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(ConnectionError("the instance is gone"))


def _error(kind: str, message: str, attributes: dict[str, Any]) -> TailserveError:
    return errors.rebuild(getattr(errors, kind), message, attributes)
