"""The loop of one model instance."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from tailserve.engine.config import EngineConfig
from tailserve.engine.errors import ExecutorLostError
from tailserve.engine.scheduler import Scheduler
from tailserve.engine.speculation.coordinator import DraftCoordinator
from tailserve.engine.speculation.drafter import Drafter
from tailserve.engine.stats import EngineGauges, EngineStats
from tailserve.engine.types import Batch, Request, StepResult, TokenChunk

logger = logging.getLogger(__name__)


MAX_LOSSES = 3
"""Losses of the executor with no step completed between them, after which its requests end: one of them may be the cause."""


class Executor(Protocol):
    """Whatever runs batches: a verifier process behind a channel, or a fake one in tests."""

    @property
    def lost(self) -> bool:
        """True once its process has ended, whether or not a step is under way."""

    def submit(self, batch: Batch) -> None: ...

    def poll(self) -> StepResult:
        """Waits for the oldest submitted step. ExecutorLostError when its process died or hangs."""

    def restart(self) -> None:
        """Starts over after a loss: no rows, no KV. Waits until the model is loaded. ExecutorLostError if it fails."""


class Engine:
    """Requests in, tokens out, one step at a time. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        drafter: Drafter | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = EngineStats()
        self.scheduler = Scheduler(config, self.stats)
        self._executor = executor
        self._clock = clock
        self._losses = 0
        self.broken = False
        """The executor could not be restarted at the last attempt."""
        self.drafts: DraftCoordinator | None = None
        if drafter is not None and config.num_speculative_tokens > 0:
            self.drafts = DraftCoordinator(
                drafter, num_tokens=config.num_speculative_tokens, timeout_s=config.draft_timeout_s, stats=self.stats
            )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Takes a request in. InvalidRequestError if it could never run."""
        self.scheduler.add(request, self._clock())

    def abort(self, request_id: str) -> TokenChunk | None:
        """Ends a request and frees its blocks; its last chunk, or None if it has ended already."""
        return self.scheduler.abort(request_id)

    @property
    def executor_lost(self) -> bool:
        """A step is due even without requests: it restarts the executor, so that the next request need not wait."""
        return self._executor.lost and not self.broken

    def step(self) -> list[TokenChunk]:
        """One step of the whole batch: schedule, run, commit. Drafts for the next step start before it returns."""
        if self.executor_lost:
            return self._recover("its process ended between two steps")
        drafts = self.drafts.collect() if self.drafts else {}
        batch = self.scheduler.schedule(self._clock(), drafts)
        if batch is None:
            return self.scheduler.take_ended()
        try:
            self._executor.submit(batch)
            result = self._executor.poll()
        except ExecutorLostError as error:
            return self._recover(error.message)
        self._losses = 0
        chunks = self.scheduler.commit(result)
        if self.drafts:
            self.drafts.start(result.step, self.scheduler.residency.running)
        return chunks

    def gauges(self) -> EngineGauges:
        residency = self.scheduler.residency
        return EngineGauges(
            num_running=len(residency.running),
            num_waiting=len(residency.waiting),
            kv_cache_usage=residency.pool.usage,
        )

    def check_integrity(self) -> None:
        """See `Scheduler.check_integrity`."""
        self.scheduler.check_integrity()

    def _recover(self, reason: str) -> list[TokenChunk]:
        logger.error("the verifier is lost (%s); restarting it, running requests go on from their tokens", reason)
        chunks = self.scheduler.take_ended()
        self.scheduler.recover()
        self.stats.executor_restarts += 1
        self._losses += 1
        if self._losses >= MAX_LOSSES:
            self._losses = 0
            chunks += self.scheduler.fail_all(f"the verifier was lost {MAX_LOSSES} times in a row: {reason}")
        try:
            self._executor.restart()
        except ExecutorLostError as error:
            self.broken = True
            return chunks + self.scheduler.fail_all(error.message)
        self.broken = False
        return chunks
