"""An ingress's side of the routers: requests out, tokens in, and on to another instance when one is lost."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol

import msgspec

from tailserve.cluster.affinity import LOADS, Placing
from tailserve.cluster.config import Timeouts
from tailserve.deployments.open_request import OpenRequest
from tailserve.deployments.streams import StepMessage
from tailserve.engine.errors import NotReadyError, TailserveError
from tailserve.engine.types import FinishReason, Request, TokenChunk

logger = logging.getLogger(__name__)

MOST_HOMES = 100_000
"""Sessions whose instance an ingress remembers; others go where their names say."""
MOST_CARRIED = 2
"""Instances that a request may lose: one that takes down whoever runs it must end."""
SUBMIT_ATTEMPTS = 3
"""Instances that may not take a new request before it is refused; Serve hears of a death a moment later."""
ASK_S = 5.0
"""How long one of them may think about it: one that is out of reach never answers."""
OVERDUE, MOST_OVERDUE_S = 0.05, 0.1
"""How much later than a request's own deadline it is ended here, if its instance has not: a step may hang. A share of the
time it had, and seconds at most."""
RETRY_S = 0.1
AVOID_S = 30.0
"""How long an instance that was lost is avoided, unless it is heard of: Serve may think for as long that it lives."""


class RouterCalls(Protocol):
    """What a client asks of routers, as coroutines; see `tailserve.deployments.router.Router`."""

    async def submit(self, request: bytes, ingress: str, *, placing: Placing) -> tuple[str, TailserveError | None]: ...
    def stream(self, ingress: str, *, instance: str) -> AsyncIterator[bytes]: ...
    async def abort(self, request_ids: list[str], *, instance: str) -> None: ...
    async def drop_session(self, tenant: str, session_id: str) -> int: ...
    async def status(self) -> dict[str, Any]: ...


class RouterClient:
    """Requests of one ingress at all instances. One stream per instance carries the tokens of all of them.

    An instance is lost when its stream breaks, when it says nothing for `silence_s`, or when it says so itself. Its requests
    go on at another from the tokens that came: noise is a function of the place, so the text is the same.
    """

    def __init__(self, calls: RouterCalls, timeouts: Timeouts, *, max_open: int) -> None:
        """`max_open`: sequences that may be open: each holds its prompt, its tokens and a connection."""
        self._calls = calls
        self._timeouts = timeouts
        self._max_open = max_open
        self._ingress = uuid.uuid4().hex
        """What instances know this one by: another name once a stream was lost, since the far end of that may still take
        messages, and would take those of later requests."""
        self._open: dict[str, OpenRequest] = {}
        self._attempts: dict[str, OpenRequest] = {}
        """By the id that the instance knows."""
        self._homes: dict[str, str] = {}
        """Session to the instance that took its last request, the longest unheard of first."""
        self._readers: dict[tuple[str, str], asyncio.Task[None]] = {}
        """By instance, and by what it knows this ingress by."""
        self._lost: dict[str, float] = {}
        """Instance to when it was lost."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._decoder = msgspec.msgpack.Decoder(StepMessage)
        self.on_refusal: Callable[[Request, TailserveError], None] | None = None
        """Called with what no instance took, and why."""

    async def submit(self, request: Request, queue: asyncio.Queue[TokenChunk]) -> None:
        """Places a request; its chunks arrive in `queue`, the last with a finish reason.

        NotReadyError when there is no room, or no instance takes it in time; what the router raises otherwise.
        """
        try:
            if len(self._open) >= self._max_open:
                text = f"{len(self._open)} sequences are open here, as many as may be; try again"
                raise NotReadyError(text, retry_after_s=1.0)
            waiting = self._open[request.id] = OpenRequest(request, queue)
            if request.timeout_s is not None:
                late_s = min(OVERDUE * request.timeout_s, MOST_OVERDUE_S)
                waiting.timer = asyncio.get_running_loop().call_later(waiting.left_s + late_s, self._expire, waiting)
            await self._place(waiting, self._timeouts.submit_s, SUBMIT_ATTEMPTS)
        except BaseException as error:
            self.cancel(request.id)
            if isinstance(error, TailserveError) and self.on_refusal is not None:
                self.on_refusal(request, error)
            raise

    async def _place(self, waiting: OpenRequest, timeout_s: float, attempts: int | None = None) -> None:
        """Asks one instance after the other, without end where `attempts` is None; until its client has left."""
        until = time.monotonic() + min(timeout_s, waiting.left_s)
        while self._open.get(waiting.request.id) is waiting:
            attempt = waiting.next_attempt()
            self._attempts[attempt.id] = waiting
            # Whoever waits for it may leave: the call goes on, and what it began is ended.
            call = self._spawn(self._ask(waiting, attempt))
            try:
                await asyncio.wait_for(asyncio.shield(call), max(min(until - time.monotonic(), ASK_S), 0))
            except TimeoutError:
                error = NotReadyError("no instance took the request in time; try again")
            except NotReadyError as refusal:
                error = refusal
            else:
                return
            if self._attempts.pop(attempt.id, None) is None:
                return  # it ended, or was carried on, by what its instance said of it meanwhile
            if waiting.begun:
                # An instance has it, whatever became of its word that it does.
                waiting.carry()
            attempts = None if attempts is None else attempts - 1
            left = until - time.monotonic()
            if attempts == 0 or left <= 0:
                raise error
            await asyncio.sleep(min(RETRY_S, left))

    async def _ask(self, waiting: OpenRequest, attempt: Request) -> None:
        session = attempt.scope if attempt.session_id is not None else None
        last = None if session is None else self._homes.get(session)
        num_tokens = len(attempt.prompt_token_ids) + len(attempt.carried or ())
        placing = Placing(attempt.slo_class, num_tokens, session, last, frozenset(waiting.lost | self._avoided()))
        ingress, asked_s = self._ingress, time.monotonic()
        instance, error = await self._calls.submit(msgspec.msgpack.encode(attempt), ingress, placing=placing)
        if error is None and self._lost.get(instance, 0.0) > asked_s:
            self._spawn(self._abort([attempt.id], instance))
            error = NotReadyError("the instance was lost before it said that it took the request; try again")
        if error is not None:
            if isinstance(error, NotReadyError):
                waiting.lost.add(instance)
            raise error
        if session is not None:
            self._homes.pop(session, None)
            self._homes[session] = instance
            if len(self._homes) > MOST_HOMES:
                del self._homes[next(iter(self._homes))]
        self._read(instance, ingress)
        if self._attempts.get(attempt.id) is waiting:
            waiting.instance, waiting.ingress = instance, ingress
        else:
            self._spawn(self._abort([attempt.id], instance))

    def _avoided(self) -> set[str]:
        self._lost = {name: at for name, at in self._lost.items() if time.monotonic() < at + AVOID_S}
        return set(self._lost)

    def cancel(self, request_id: str) -> None:
        """Forgets a request and ends it at its instance. Needs no waiting: what still arrives for it is ended too."""
        gone = self._open.get(request_id)
        if gone is not None:
            self._forget(gone)
            if gone.instance is not None:
                self._spawn(self._abort([gone.attempt_id], gone.instance))

    def _forget(self, gone: OpenRequest) -> None:
        del self._open[gone.request.id]
        self._attempts.pop(gone.attempt_id, None)
        if gone.timer is not None:
            gone.timer.cancel()

    def _expire(self, waiting: OpenRequest) -> None:
        """Its time is over, and its instance has not said so."""
        self.cancel(waiting.request.id)
        waiting.fail("its time is over")

    async def drop_session(self, tenant: str, session_id: str) -> int:
        """Frees what all instances keep of a session. Returns how many KV blocks that were."""
        return await self._calls.drop_session(tenant, session_id)

    def _read(self, instance: str, ingress: str) -> None:
        if (instance, ingress) not in self._readers:
            self._readers[instance, ingress] = self._spawn(self._read_stream(instance, ingress))

    async def _read_stream(self, instance: str, ingress: str) -> None:
        silence_s = self._timeouts.silence_s
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(silence_s) as limit:
                async for data in self._calls.stream(ingress, instance=instance):
                    limit.reschedule(clock() + silence_s)
                    if data:
                        self.receive(instance, data)
        except Exception as failure:  # noqa: BLE001 (whatever broke it, its requests must go on)
            why = f"it said nothing for {silence_s:g} s" if isinstance(failure, TimeoutError) else str(failure)
            self._lose(instance, why)
        finally:
            del self._readers[instance, ingress]
        # The router closes an idle stream; a request may have been accepted there at the same moment.
        if any((waiting.instance, waiting.ingress) == (instance, ingress) for waiting in self._open.values()):
            self._read(instance, ingress)

    def receive(self, instance: str, data: bytes) -> None:
        """Takes an encoded `StepMessage`, whichever way it came."""
        message = self._decoder.decode(data)
        LOADS.note(instance, message.load, time.monotonic())
        self._lost.pop(instance, None)
        strays = []
        for chunk in message.chunks:
            waiting = self._attempts.get(chunk.request_id)
            if waiting is None:
                if chunk.finish_reason is None:
                    strays.append(chunk.request_id)
            elif chunk.finish_reason is FinishReason.LOST:
                self._carry(waiting, chunk.error or "")
            else:
                waiting.take(chunk)
                if chunk.finish_reason is not None:
                    self._forget(waiting)
        if strays:
            # Cancelled, or given up, before its instance was known.
            self._spawn(self._abort(strays, instance))

    def _lose(self, instance: str, why: str) -> None:
        requests = [waiting for waiting in self._open.values() if waiting.instance == instance]
        self._lost[instance] = time.monotonic()
        self._ingress = uuid.uuid4().hex
        logger.warning("instance %s is lost, %d requests of it go on elsewhere: %s", instance, len(requests), why)
        if requests:
            # It may only have been out of reach.
            self._spawn(self._abort([waiting.attempt_id for waiting in requests], instance))
        for waiting in requests:
            self._carry(waiting, f"the instance that ran the request is gone: {why}")

    def _carry(self, waiting: OpenRequest, why: str) -> None:
        if waiting.num_carried == MOST_CARRIED:
            self._forget(waiting)
            waiting.fail(f"{why}; {MOST_CARRIED} others before it, too")
            return
        self._attempts.pop(waiting.attempt_id, None)
        waiting.carry()
        self._spawn(self._carry_on(waiting, why))

    async def _carry_on(self, waiting: OpenRequest, why: str) -> None:
        try:
            await self._place(waiting, self._timeouts.carry_s)
        except Exception as error:  # noqa: BLE001 (whatever it is, the request must end)
            if self._open.get(waiting.request.id) is waiting:
                self._forget(waiting)
                waiting.fail(f"{why}; no other took it over: {error}")

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
