"""The loop of one model instance."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import StepTimes
from tailserve.engine.errors import ExecutorLostError
from tailserve.engine.load import Demand, Load, measure_demand, measure_load
from tailserve.engine.pace import Pace
from tailserve.engine.scheduler import Scheduler
from tailserve.engine.speculation.coordinator import DraftCoordinator, draft_limit
from tailserve.engine.speculation.drafter import Drafter
from tailserve.engine.speculation.policy import DraftPolicy
from tailserve.engine.speculation.selection import DraftSelection
from tailserve.engine.stats import EngineGauges, EngineStats
from tailserve.engine.types import Batch, Request, StepResult, TokenChunk
from tailserve.engine.under_way import StepUnderWay

logger = logging.getLogger(__name__)


LEAD_S = 0.002
LEAD_SHARE = 0.1
"""How long before a step's expected end the next is scheduled: what the router needs for it on a busy machine, and the share
of the step by which many end sooner than expected. Whoever comes later waits for the step after."""
PREFIX_POLL_S = 0.001
"""How soon after it comes a draft's prefix is passed on."""
MAX_LOSSES = 3
"""Losses of the executor after which a request ends that got no token between them."""


class Executor(Protocol):
    """Whatever runs batches: a verifier process behind a channel, or a fake one in tests."""

    @property
    def lost(self) -> bool:
        """True once its process has ended, whether or not a step is under way."""

    def submit(self, batch: Batch) -> None:
        """Starts a step, or puts it behind those under way."""

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        """Waits for the oldest submitted step; None if it takes longer than `timeout_s`.

        ExecutorLostError when its process died or hangs.
        """

    def restart(self) -> None:
        """Starts over after a loss: no rows, no KV. Waits until the model is loaded. ExecutorLostError if it fails."""


class Engine:
    """Requests in, tokens out. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        drafter: Drafter | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = EngineStats()
        self._times = StepTimes(config.step_profile)
        self._policy = DraftPolicy(self._times)
        self.scheduler = Scheduler(config, self.stats, DraftSelection(self._policy, self.stats), self._times)
        self._executor = executor
        self._clock = clock
        self._under_way: deque[StepUnderWay] = deque()
        """The submitted steps, oldest first."""
        self._ended: tuple[StepUnderWay, StepResult] | None = None
        """The last step, if nothing was learnt from it yet."""
        self._committed_at: float | None = None
        """When the step before those under way was; None if there was a pause."""
        self._ends: float | None = None
        """When the step that runs is expected to end."""
        self._due = 0.0
        """When the step behind the one that runs is to be scheduled."""
        self.broken = False
        """The executor could not be restarted at the last attempt."""
        self._has_prefixes = any(slo.speculative_prefix for slo in config.classes)
        self.drafts: DraftCoordinator | None = None
        if drafter is not None and (self._has_prefixes or any(draft_limit(slo.speculation) for slo in config.classes)):
            self.drafts = DraftCoordinator(
                drafter,
                self._policy,
                sampled=config.sampled_drafts,
                num_outcomes=config.num_outcomes,
                width=config.draft_branches,
                timeout_s=config.draft_timeout_s,
                stats=self.stats,
            )

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.has_work or self._under_way)

    def add(self, request: Request) -> None:
        """Takes a request in. InvalidRequestError if it could never run."""
        self.scheduler.add(request, self._clock(), drafts=self.drafts is not None and self.drafts.available)

    def abort(self, request_id: str) -> TokenChunk | None:
        """Ends a request and frees its blocks; its last chunk, or None if it has ended already."""
        return self.scheduler.abort(request_id)

    def drop_session(self, tenant: str, session_id: str) -> int:
        """Forgets what is kept of a session. Returns how many blocks that were."""
        return self.scheduler.pins.drop(tenant, session_id)

    @property
    def executor_lost(self) -> bool:
        """A step is due even without requests: it restarts the executor, so that the next request need not wait."""
        return self._executor.lost and not self.broken

    def step(self) -> list[TokenChunk]:
        """Goes on with the batch: schedule, run, commit. Drafts for the next step start before it returns.

        The next step is scheduled shortly before the one that runs has ended, so that the verifier need not wait for it and
        who arrives meanwhile is in it. To let them in, a call returns at that moment too, with nothing.
        """
        self._learn()
        if self.executor_lost:
            return self._recover("its process ended between two steps")
        if first := self._take_prefixes():
            return first
        try:
            if not self._under_way or (len(self._under_way) < self._depth and self._clock() >= self._due):
                self._schedule()
            if not self._under_way:
                self._committed_at = None
                return self.scheduler.take_ended()
            result = self._executor.poll(self._time_to_spare())
        except ExecutorLostError as error:
            return self._recover(error.message)
        if result is None:
            return self.scheduler.take_ended()
        done = self._under_way.popleft()
        self._ended = done, result
        self.stats.moved_blocks += done.num_moves
        self.stats.move_seconds += result.moved_s
        self._expect_end()
        chunks = self.scheduler.commit(result, self._clock())
        self._note_step(done, result)
        if self.drafts and not self._under_way:
            self.drafts.start(result.step, self.scheduler.residency.running, states=done.states)
        return chunks

    def _learn(self) -> None:
        """What the last step's time says of later ones. By now its tokens are on their way."""
        if self._ended is not None:
            done, result = self._ended
            self._ended = None
            done.teach(self._times, result)

    def _take_prefixes(self) -> list[TokenChunk]:
        """What the draft wrote while the verifier reads prompts."""
        if self.drafts is None or not self._has_prefixes:
            return []
        found = self.drafts.take_prefixes()
        self.drafts.ask_prefixes(self.scheduler.residency.running)
        now = self._clock()
        taken = (self.scheduler.take_prefix(row, tokens, now) for row, tokens in found.items())
        return [chunk for chunk in taken if chunk is not None]

    @property
    def _depth(self) -> int:
        """Steps at the verifier. Behind one with drafts nothing can be scheduled."""
        if self.drafts is None:
            return 2
        # What is wanted now need not be what was wanted when that step was scheduled.
        behind_drafts = any(step.has_drafts for step in self._under_way)
        return 1 if behind_drafts or self.drafts.wanted(self.scheduler.residency.running) else 2

    def _note_step(self, done: StepUnderWay, result: StepResult) -> None:
        """What a step says of drafting."""
        now, before = self._clock(), self._committed_at
        self._committed_at = now if self.has_work else None
        if not done.only_generates:
            self._policy.note_mixed_step(done.num_sequences, drafted=done.drafted)
        elif before is not None and now > before:
            made = sum(map(len, result.token_ids))
            self._policy.note_step(done.num_sequences, made, now - before, result.duration_s, drafted=done.drafted)

    def _schedule(self) -> None:
        running = self.scheduler.residency.running
        drafts = self.drafts.collect(running) if self.drafts else {}
        wanted = self.drafts is not None and self.drafts.wanted(running)
        now = self._clock()
        start = now if self._ends is None else max(self._ends, now)
        batch = self.scheduler.schedule(now, drafts, start=start)
        # Without anything to put behind it, the step that runs is waited for.
        self._due = math.inf
        if batch is not None:
            batch = self.drafts.with_states(batch, running) if self.drafts else batch
            self._executor.submit(batch)
            self.stats.drafted_steps += bool(batch.drafts)
            self._under_way.append(StepUnderWay.of(batch, drafted=wanted))
            if len(self._under_way) == 1:
                self._expect_end()
            if self.drafts and self._has_prefixes:
                self.drafts.ask_prefixes(running)
            if self.drafts and wanted and self.drafts.foresees:
                self.drafts.foresee(batch.step, running, self.scheduler.survivals(batch.step))

    def _expect_end(self) -> None:
        """A step begins to run now, if there is one: when to schedule the next."""
        step = self._under_way[0] if self._under_way else None
        predicted = step and step.predict(self._times)
        if predicted is None:
            self._ends, self._due = None, math.inf
            return
        self._ends = self._clock() + predicted
        self._due = self._ends - LEAD_S - LEAD_SHARE * predicted

    def _time_to_spare(self) -> float | None:
        """Seconds until the next step is to be scheduled; None if that is not due before a result."""
        waits = len(self._under_way) >= self._depth or self._due == math.inf
        left = math.inf if waits else max(self._due - self._clock(), 0.0)
        if self.drafts is not None and self.drafts.awaits_prefix:
            left = min(left, PREFIX_POLL_S)
        return None if left == math.inf else left

    def gauges(self) -> EngineGauges:
        residency = self.scheduler.residency
        return EngineGauges(
            num_running=len(residency.running),
            num_waiting=len(residency.waiting),
            kv_cache_usage=residency.pool.usage,
            host_kv_cache_usage=residency.host.usage,
        )

    def load(self, *, reading: bool = True) -> Load:
        """What admission goes by; see `measure_load`."""
        return measure_load(self.scheduler, self._times, reading=reading)

    def demand(self) -> Demand:
        """What autoscaling goes by; see `measure_demand`."""
        return measure_demand(self.scheduler)

    def paces(self) -> Mapping[str, Pace]:
        """Each class's cap, and what its sequences see."""
        return self.scheduler.planner.paces

    def prediction_errors(self) -> tuple[float, float]:
        """See `StepTimes.errors`."""
        return self._times.errors()

    def check_integrity(self) -> None:
        """See `Scheduler.check_integrity`."""
        self.scheduler.check_integrity()

    def _recover(self, reason: str) -> list[TokenChunk]:
        logger.error("the verifier is lost (%s); restarting it, running requests go on from their tokens", reason)
        chunks = self.scheduler.take_ended()
        self._under_way.clear()
        self._committed_at = None
        chunks += self.scheduler.recover(MAX_LOSSES, f"the verifier was lost {MAX_LOSSES} times while this ran: {reason}")
        self.stats.executor_restarts += 1
        try:
            self._executor.restart()
        except ExecutorLostError as error:
            self.broken = True
            return chunks + self.scheduler.lose_all(error.message)
        self.broken = False
        return chunks
