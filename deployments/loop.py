"""The engine's thread: takes requests in, steps, and publishes tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import msgspec

from tailserve.cluster import autoscaling
from tailserve.engine.admission import Admission
from tailserve.engine.engine import Engine
from tailserve.engine.errors import InvalidRequestError, NotReadyError, QueueFullError
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import FinishReason, Request, SloClass, TokenChunk

logger = logging.getLogger(__name__)

LOAD_S = 0.05
"""How old what admission goes by may be: to ask the engine in every step would cost each of them."""
IDLE_CHECK_S = 1.0
"""How soon the death of an idle verifier is noticed."""

Publish = Callable[[Mapping[str, list[TokenChunk]], InstanceLoad], None]


class EngineLoop:
    """Runs an engine in a thread of its own. The other methods may be called from any thread.

    Requests and aborts wait in an inbox until the next step is scheduled, or the one under way has ended.
    """

    def __init__(self, engine: Engine, classes: tuple[SloClass, ...], publish: Publish) -> None:
        self._engine = engine
        self._classes = {slo.name: slo for slo in classes}
        self._publish = publish
        self._work = threading.Condition()
        self._requests: list[tuple[Request, float]] = []
        self._aborts: list[str] = []
        self._abort_ingresses: list[str] = []
        self._drops: list[tuple[str, str, Future[int]]] = []
        self._admission = Admission(classes)
        self._state_s = float("-inf")
        self._note_load(time.monotonic())
        self._stopping = False
        self.failure: BaseException | None = None
        self._owners: dict[str, str] = {}
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, ingress: str) -> None:
        """Accepts a request for an ingress; its tokens are published until it ends.

        QueueFullError, saying when to come back, when its class is full (see `Admission`); NotReadyError when the engine is
        gone.
        """
        slo = self._classes.get(request.slo_class)
        if slo is None:
            raise InvalidRequestError(f"unknown SLO class {request.slo_class!r}", param="slo_class")
        with self._work:
            if self._stopping or self.failure is not None or self._engine.broken:
                raise NotReadyError("this instance is shutting down; try again")
            if request.id in self._owners:
                raise InvalidRequestError(f"request id {request.id!r} is already in use", param="request_id")
            wait = self._admission.ask(request, time.monotonic())
            if wait is not None:
                raise QueueFullError(
                    f"class {slo.name!r} is full; come back in {wait:.1f} s: a place is kept for this request",
                    retry_after_s=wait,
                )
            self._owners[request.id] = ingress
            self._requests.append((request, time.monotonic()))
            self._idle.clear()
            self._work.notify()

    def abort(self, request_ids: list[str]) -> None:
        """Ends requests; unknown ones are ignored, since a request may end by itself meanwhile."""
        with self._work:
            self._aborts += request_ids
            self._idle.clear()
            self._work.notify()

    def abort_ingress(self, ingress: str) -> None:
        """Ends all requests of an ingress that is gone."""
        with self._work:
            self._abort_ingresses.append(ingress)
            self._idle.clear()
            self._work.notify()

    def drop_session(self, tenant: str, session_id: str) -> Future[int]:
        """Frees what is kept of a session before the next step; the result is how many KV blocks that were."""
        count: Future[int] = Future()
        with self._work:
            if self._stopping:
                count.set_result(0)
            else:
                self._drops.append((tenant, session_id, count))
                self._idle.clear()
                self._work.notify()
        return count

    def report(self) -> dict[str, float]:
        """What autoscaling goes by; see `autoscaling.report`."""
        with self._work:
            if self._idle.is_set():
                # While nothing happens nobody notes it.
                self._note_load(time.monotonic())
            demand, gauges = self._engine.demand(), self._engine.gauges()
            return autoscaling.report(
                slots=demand.slots,
                kv=gauges.kv_cache_usage,
                waits_s=self._state.waits_s,
                ttft_s={name: slo.ttft_s for name, slo in self._classes.items()},
                num_open=demand.num_open,
            )

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether the engine has nothing to do, waiting up to `timeout_s` for it."""
        return self._idle.wait(timeout_s)

    def stop(self) -> None:
        """Ends the thread after the step under way; open requests are lost to this instance."""
        with self._work:
            self._stopping = True
            self._idle.clear()
            self._work.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._deliver(self._engine.step())
        except BaseException as error:
            logger.exception("the engine stopped")
            self.failure = error
        with self._work:
            self._stopping = True
            drops, self._drops = self._drops, []
        for _, _, count in drops:
            if count.set_running_or_notify_cancel():
                count.set_result(0)
        # Those in the inbox included. The engine's own state is in doubt after a failure.
        text = "the instance stopped; the request was not completed"
        self._deliver([TokenChunk(name, finish_reason=FinishReason.LOST, error=text) for name in list(self._owners)])

    def _take_in(self) -> bool:
        """Waits for work and moves the inbox into the engine. False when it is time to stop."""
        with self._work:
            while not (self._has_work() or self._stopping or self._engine.executor_lost):
                self._idle.set()
                self._work.wait(IDLE_CHECK_S)
            self._idle.clear()
            requests, self._requests = self._requests, []
            aborts, self._aborts = self._aborts, []
            gone, self._abort_ingresses = set(self._abort_ingresses), []
            drops, self._drops = self._drops, []
            ended: list[TokenChunk] = []
            for request, received in requests:
                try:
                    self._engine.add(_aged(request, time.monotonic() - received))
                except InvalidRequestError as error:
                    ended.append(TokenChunk(request.id, finish_reason=FinishReason.ERROR, error=error.message))
            # Aborts come after additions: an abort never overtakes its request.
            aborts += [request_id for request_id, ingress in list(self._owners.items()) if ingress in gone]
            ended += [chunk for request_id in aborts if (chunk := self._engine.abort(request_id)) is not None]
            for tenant, session_id, count in drops:
                # Whoever asked may have left; the session is dropped all the same.
                dropped = self._engine.drop_session(tenant, session_id)
                if count.set_running_or_notify_cancel():
                    count.set_result(dropped)
            now = time.monotonic()
            if requests or now >= self._noted_s + LOAD_S:
                self._note_load(now)
            stopping = self._stopping
        self._deliver(ended)
        return not stopping

    def _has_work(self) -> bool:
        return bool(self._engine.has_work or self._requests or self._aborts or self._abort_ingresses or self._drops)

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        by_ingress: dict[str, list[TokenChunk]] = {}
        for chunk in chunks:
            by_ingress.setdefault(self._owners[chunk.request_id], []).append(chunk)
            if chunk.finish_reason is not None:
                del self._owners[chunk.request_id]
        self._publish(by_ingress, self._state)

    def _note_load(self, now: float) -> None:
        self._noted_s = now
        tells = now >= self._state_s + LOAD_S
        self._admission.note(self._engine.load(reading=tells), now)
        if tells:
            self._state_s = now
            self._state = self._admission.state(self._engine.gauges().num_waiting, now)


def _aged(request: Request, seconds: float) -> Request:
    return msgspec.structs.replace(request, age_s=request.age_s + seconds)
