"""The verifier: an actor that holds the large model, and the router's executor in front of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray

from tailserve.deployments.channel import Outlet
from tailserve.deployments.process import ModelActor, ModelProcess
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
    block_verification: bool = False
    """Of drafts that were drawn by chance."""


class VerifierActor(ModelActor[VerifierOptions, ModelInfo]):
    """Loads the model and runs batches. Lives in a process, and on a GPU, of its own."""

    incoming = Batch

    def prepare(self, options: VerifierOptions) -> tuple[ModelInfo, Callable[[Batch], StepResult]]:
        """Loads the model and says what the scheduler needs to know of it. Raises what `load_model` raises."""
        # The router that defines this actor imports no torch.
        from tailserve.engine.model.loading import load_model
        from tailserve.engine.model.profile import profile_steps
        from tailserve.engine.model.runner import ModelRunner

        model, info = load_model(options.load)
        publish = None
        if options.feature_layers:
            model.tap(options.feature_layers)
            publish = Outlet[StateMessage](options.states_endpoint).send
        info = msgspec.structs.replace(info, step_profile=profile_steps(model))
        runner = ModelRunner(
            model,
            publish,
            block_verification=options.block_verification,
            num_blocks=info.num_blocks,
            num_host_blocks=info.num_host_blocks,
        )
        return info, runner.run


class VerifierExecutor:
    """`tailserve.engine.engine.Executor` over a verifier process."""

    def __init__(
        self,
        options: VerifierOptions,
        *,
        directory: Path,
        bundle_index: int = 1,
        actor_options: dict[str, Any],
        load_timeout_s: float,
        step_timeout_s: float,
        max_restarts: int = 3,
    ) -> None:
        self.process: ModelProcess[Batch, StepResult] = ModelProcess(
            "verifier",
            VerifierActor,
            load_options=options,
            incoming=StepResult,
            directory=directory,
            bundle_index=bundle_index,
            actor_options=actor_options,
            load_timeout_s=load_timeout_s,
        )
        self._step_timeout_s = step_timeout_s
        self._max_restarts = max_restarts
        self._waiting_since: float | None = None
        """Since when the oldest step has been waited for."""

    def start(self) -> ModelInfo:
        info: ModelInfo = self.process.start()
        return info

    @property
    def lost(self) -> bool:
        return self.process.ended

    def submit(self, batch: Batch) -> None:
        channel = self.process.channel
        if channel is None or self.process.ended or not channel.send(batch):
            raise ExecutorLostError("the verifier process ended between two steps")

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        channel = self.process.channel
        assert channel is not None
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        until = math.inf if timeout_s is None else now + timeout_s
        while (result := channel.receive(max(min(POLL_S, until - now), 0.0))) is None:
            now = time.monotonic()
            if self.process.ended:
                raise ExecutorLostError("the verifier process ended in a step")
            if now - self._waiting_since > self._step_timeout_s:
                raise ExecutorLostError(f"the verifier did not answer within {self._step_timeout_s:g} s")
            if now >= until:
                return None
        self._waiting_since = None
        return result

    def restart(self) -> None:
        self._waiting_since = None
        for attempt in range(1, self._max_restarts + 1):
            self.process.kill()
            try:
                self.process.start()
            except (ray.exceptions.RayError, ExecutorLostError) as error:
                logger.error("restart %d of %d of the verifier failed: %s", attempt, self._max_restarts, error)
            else:
                return
        raise ExecutorLostError(f"the verifier could not be restarted in {self._max_restarts} attempts")

    def stop(self) -> None:
        self.process.kill()
