"""An ingress's side of the routers: requests out, tokens in."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol

import msgspec

from tailserve.cluster.affinity import LOADS, Placing
from tailserve.deployments.streams import StepMessage
from tailserve.engine.errors import NotReadyError
from tailserve.engine.types import FinishReason, Request, TokenChunk

logger = logging.getLogger(__name__)

MOST_HOMES = 100_000
"""Sessions whose instance an ingress remembers; others go where their names say."""


class RouterCalls(Protocol):
    """The router deployment's methods, as coroutines; see `tailserve.deployments.router.Router`."""

    async def submit(self, request: bytes, ingress: str, *, placing: Placing) -> str: ...
    def stream(self, ingress: str, *, instance: str) -> AsyncIterator[bytes]: ...
    async def abort(self, request_ids: list[str], *, instance: str) -> None: ...
    async def drop_session(self, tenant: str, session_id: str) -> int: ...
    async def status(self) -> dict[str, Any]: ...


class RouterClient:
    """Requests of one ingress at all instances. One stream per instance carries the tokens of all of them."""

    def __init__(self, calls: RouterCalls, *, submit_timeout_s: float) -> None:
        self._calls = calls
        self._submit_timeout_s = submit_timeout_s
        self._ingress = uuid.uuid4().hex
        self._queues: dict[str, asyncio.Queue[TokenChunk]] = {}
        self._instances: dict[str, str] = {}
        """Request id to the instance that accepted it."""
        self._homes: dict[str, str] = {}
        """Session to the instance that took its last request, the longest unheard of first."""
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._decoder = msgspec.msgpack.Decoder(StepMessage)

    async def submit(self, request: Request, queue: asyncio.Queue[TokenChunk]) -> None:
        """Places a request; its chunks arrive in `queue`, the last with a finish reason.

        NotReadyError when no instance takes it in time; what the router raises otherwise.
        """
        self._queues[request.id] = queue
        session = request.scope if request.session_id is not None else None
        last = None if session is None else self._homes.get(session)
        placing = Placing(request.slo_class, len(request.prompt_token_ids), session, last)
        call = self._spawn(self._calls.submit(msgspec.msgpack.encode(request), self._ingress, placing=placing))
        call.add_done_callback(lambda done: self._placed(request.id, session, done))
        try:
            await asyncio.wait_for(asyncio.shield(call), self._submit_timeout_s)
        except TimeoutError:
            self.cancel(request.id)
            raise NotReadyError("no instance took the request in time; try again") from None
        except BaseException:
            self.cancel(request.id)
            raise

    def _placed(self, request_id: str, session: str | None, call: asyncio.Task[str]) -> None:
        """Whoever waited for it may have left: then the request is ended where it was placed."""
        if call.cancelled() or call.exception() is not None:
            return
        self._instances[request_id] = call.result()
        if session is not None:
            self._homes.pop(session, None)
            self._homes[session] = call.result()
            if len(self._homes) > MOST_HOMES:
                del self._homes[next(iter(self._homes))]
        self._read(call.result())
        if request_id not in self._queues:
            self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """Forgets a request and ends it at its instance. Needs no waiting: what still arrives for it is ended too."""
        self._queues.pop(request_id, None)
        instance = self._instances.pop(request_id, None)
        if instance is not None:
            self._spawn(self._abort([request_id], instance))

    async def drop_session(self, tenant: str, session_id: str) -> int:
        """Frees what all instances keep of a session. Returns how many KV blocks that were."""
        return await self._calls.drop_session(tenant, session_id)

    def _read(self, instance: str) -> None:
        if instance not in self._readers:
            self._readers[instance] = self._spawn(self._read_stream(instance))

    async def _read_stream(self, instance: str) -> None:
        try:
            async for data in self._calls.stream(self._ingress, instance=instance):
                self._dispatch(self._decoder.decode(data), instance)
        except Exception as failure:  # noqa: BLE001 (whatever broke it, its requests must end)
            logger.warning("the stream of instance %s broke: %s", instance, failure)
            self._fail(instance, f"the instance that ran the request is gone: {failure}")
        finally:
            del self._readers[instance]
        # The router closes an idle stream; a request may have been accepted there at the same moment.
        if instance in self._instances.values():
            self._read(instance)

    def _dispatch(self, message: StepMessage, instance: str) -> None:
        LOADS.note(instance, message.load, time.monotonic())
        strays = []
        for chunk in message.chunks:
            queue = self._queues.get(chunk.request_id)
            if queue is not None:
                queue.put_nowait(chunk)
            elif chunk.finish_reason is None:
                strays.append(chunk.request_id)
            if chunk.finish_reason is not None:
                self._queues.pop(chunk.request_id, None)
                self._instances.pop(chunk.request_id, None)
        if strays:
            # Cancelled before its instance was known.
            self._spawn(self._abort(strays, instance))

    def _fail(self, instance: str, error: str) -> None:
        for request_id in [key for key, value in self._instances.items() if value == instance]:
            del self._instances[request_id]
            queue = self._queues.pop(request_id, None)
            if queue is not None:
                queue.put_nowait(TokenChunk(request_id, finish_reason=FinishReason.ERROR, error=error))

    async def _abort(self, request_ids: list[str], instance: str) -> None:
        try:
            await self._calls.abort(request_ids, instance=instance)
        except Exception as error:  # noqa: BLE001 (the instance ends requests without a reader by itself)
            logger.warning("could not abort %s at %s: %s", request_ids, instance, error)

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        # A context of its own: Serve cancels the calls of a request with the request, and these outlive it.
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
