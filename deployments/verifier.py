"""The verifier: an actor that holds the large model, or one for each rank of it, and the router's executor in front."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec
import ray
from msgspec.structs import replace

from tailserve.deployments.channel import Outlet
from tailserve.deployments.process import ModelActor, ModelProcess
from tailserve.deployments.sockets import Sockets
from tailserve.deployments.tracing import RowSpans, open_tracer
from tailserve.engine.errors import ExecutorLostError
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.drafter import StateMessage
from tailserve.engine.types import Batch, ModelInfo, StepResult

logger = logging.getLogger(__name__)

POLL_S = 0.05
"""How soon a verifier's death is noticed while its answer is awaited."""


class VerifierOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the verifier process runs."""

    load: LoadOptions
    feature_layers: tuple[int, ...] = ()
    """Layers whose hidden states the draft reads."""
    states_endpoint: str = ""
    """Where they go."""
    traces_endpoint: str | None = None
    """Of a collector; None: nothing is traced."""
    block_verification: bool = False
    """Of drafts that were drawn by chance."""


class VerifierActor(ModelActor[VerifierOptions, ModelInfo]):
    """Loads the model and runs batches. Lives in a process, and on a GPU, of its own."""

    incoming = Batch

    def prepare(self, options: VerifierOptions) -> tuple[ModelInfo, Callable[[Batch], StepResult | None]]:
        """Loads the model and says what the scheduler needs to know of it. Raises what `load_model` raises.

        All ranks run all batches; the first answers.
        """
        # The router that defines this actor imports no torch.
        from tailserve.engine.model.loading import load_model
        from tailserve.engine.model.profile import profile_steps
        from tailserve.engine.model.runner import ModelRunner

        model, info = load_model(options.load)
        publish = None
        if options.feature_layers:
            # On all ranks: it may run the model, and ranks run together.
            model.tap(options.feature_layers)
            if options.load.rank == 0:
                publish = Outlet[StateMessage](options.states_endpoint).send
        info = replace(info, step_profile=profile_steps(model, info.max_model_len))
        runner = ModelRunner(
            model,
            publish,
            block_verification=options.block_verification,
            num_blocks=info.num_blocks,
            num_host_blocks=info.num_host_blocks,
        )

        if options.load.rank:

            def run_along(batch: Batch) -> None:
                runner.run(batch)

            return info, run_along
        tracer = open_tracer(options.traces_endpoint, "verifier")
        return info, runner.run if tracer is None else _traced(runner.run, RowSpans(tracer, "verify"))


def _traced(run: Callable[[Batch], StepResult], spans: RowSpans) -> Callable[[Batch], StepResult]:
    def run_and_note(batch: Batch) -> StepResult:
        spans.leave(batch.leaves)
        for join in batch.joins:
            spans.join(join.row, join.traceparent)
        result = run(batch)
        spans.note(batch.rows, result.duration_s)
        return result

    return run_and_note


class VerifierExecutor:
    """`tailserve.engine.engine.Executor` over the verifier's processes: one for each rank.

    Where one of them dies all are started anew: the others wait for it inside of a step.
    """

    def __init__(
        self,
        options: VerifierOptions,
        *,
        sockets: Sockets,
        first_bundle: int = 1,
        actor_options: dict[str, Any],
        load_timeout_s: float,
        step_timeout_s: float,
        max_restarts: int = 3,
    ) -> None:
        self.load_options = options
        """What the next start loads, at each rank with its number."""
        self._sockets = sockets
        self.processes: list[ModelProcess[Batch, StepResult]] = [
            ModelProcess(
                f"verifier-{rank}" if rank else "verifier",
                VerifierActor,
                load_options=options,
                incoming=StepResult,
                sockets=sockets,
                bundle_index=first_bundle + rank,
                actor_options=actor_options,
                load_timeout_s=load_timeout_s,
            )
            for rank in range(options.load.tensor_parallel_size)
        ]
        self._load_timeout_s = load_timeout_s
        self._step_timeout_s = step_timeout_s
        self._max_restarts = max_restarts
        self._waited_s = 0.0
        """For the oldest step, as far as this process ran: where it was stopped, its verifier was stopped, too."""

    def start(self) -> ModelInfo:
        """Starts all ranks. Raises what `ModelProcess.start` raises at the first of them that does."""
        meeting = self._meeting()
        for rank, process in enumerate(self.processes):
            load = replace(self.load_options.load, rank=rank, rendezvous=meeting)
            process.load_options = replace(self.load_options, load=load)
        with ThreadPoolExecutor(len(self.processes)) as threads:
            starts: list[Future[ModelInfo]] = [threads.submit(process.start) for process in self.processes]
            done, _ = wait(starts, return_when=FIRST_EXCEPTION)
            failure = next((error for start in done if (error := start.exception()) is not None), None)
            if failure is not None:
                # The others wait for it.
                self.stop()
                raise failure
        return starts[0].result()

    def _meeting(self) -> str:
        """Where ranks find each other: a new place each time."""
        if not self._sockets.host or len(self.processes) == 1:
            return f"file://{self._sockets.directory}/ranks-{uuid.uuid4().hex}"
        first = self.processes[0].create()
        try:
            return f"tcp://{ray.get(first.address.remote(), timeout=self._load_timeout_s)}"
        except ray.exceptions.GetTimeoutError:
            self.stop()
            raise ExecutorLostError(f"no node had room for the verifier within {self._load_timeout_s:g} s") from None

    @property
    def lost(self) -> bool:
        return any(process.ended for process in self.processes)

    def submit(self, batch: Batch) -> None:
        for process in self.processes:
            channel = process.channel
            if channel is None or process.ended or not channel.send(batch):
                raise ExecutorLostError(f"the {process.name} process ended between two steps")

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        channel = self.processes[0].channel
        assert channel is not None
        now = time.monotonic()
        until = math.inf if timeout_s is None else now + timeout_s
        while (result := channel.receive(max(min(POLL_S, until - now), 0.0))) is None:
            before, now = now, time.monotonic()
            self._waited_s += min(now - before, 2 * POLL_S)
            if self.lost:
                raise ExecutorLostError("a verifier process ended in a step")
            if self._waited_s > self._step_timeout_s:
                raise ExecutorLostError(f"the verifier did not answer within {self._step_timeout_s:g} s")
            if now >= until:
                return None
        self._waited_s = 0.0
        return result

    def restart(self) -> None:
        self._waited_s = 0.0
        for attempt in range(1, self._max_restarts + 1):
            self.stop()
            try:
                self.start()
            except (ray.exceptions.RayError, ExecutorLostError) as error:
                logger.error("restart %d of %d of the verifier failed: %s", attempt, self._max_restarts, error)
            else:
                return
        raise ExecutorLostError(f"the verifier could not be restarted in {self._max_restarts} attempts")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
