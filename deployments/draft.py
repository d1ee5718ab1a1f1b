"""The draft: an actor that proposes tokens, and the router's link to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tailserve.deployments.channel import Channel, Inlet
from tailserve.deployments.process import ModelActor, ModelProcess
from tailserve.deployments.sockets import Sockets
from tailserve.deployments.tracing import RowSpans, open_tracer
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.drafter import DraftResult, DraftWork, StateMessage
from tailserve.engine.speculation.ngram import NgramDrafter

logger = logging.getLogger(__name__)

STATES_TIMEOUT_S = 0.01
"""How long a draft waits for states that have been sent."""
RETRY_S = 5.0
"""Pause between attempts to bring a draft back."""


class DraftOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What kind of draft to run."""

    kind: str = "ngram"
    """ngram; model: a causal language model of the verifier's vocabulary; eagle: a head that reads the verifier's states,
    beside n-grams."""
    load: LoadOptions | None = None
    """How to load the model; for a head, how the verifier is loaded."""
    folder: str = ""
    """Of the head."""
    states_endpoint: str = ""
    """Where the verifier's states come in."""
    verifier: str = ""
    """Directory of the verifier, whose vocabulary a model may not share."""
    traces_endpoint: str | None = None
    """Of a collector; None: nothing is traced."""
    max_num_batched_tokens: int = 512
    verifier_num_blocks: int = 0


class DraftActor(ModelActor[DraftOptions, None]):
    """Keeps rows of tokens and proposes how they go on."""

    incoming = DraftWork

    def prepare(self, options: DraftOptions) -> tuple[None, Callable[[DraftWork], DraftResult]]:
        """Loads what the draft is made of. ConfigError if it does not fit the verifier."""
        run = self._load(options)
        tracer = open_tracer(options.traces_endpoint, "draft")
        return None, run if tracer is None else _traced(run, RowSpans(tracer, "draft"))

    def _load(self, options: DraftOptions) -> Callable[[DraftWork], DraftResult]:
        if options.kind == "ngram":
            return NgramDrafter().run
        assert options.load is not None
        # The router that defines this actor imports no torch.
        if options.kind == "model":
            from tailserve.engine.model.draft import load_drafter

            drafter = load_drafter(
                options.load, verifier=options.verifier, max_num_batched_tokens=options.max_num_batched_tokens
            )
            return drafter.run
        from tailserve.engine.model.combined_drafter import CombinedDrafter
        from tailserve.engine.model.eagle_loading import load_eagle_drafter

        head = load_eagle_drafter(Path(options.folder), options.load, num_blocks=options.verifier_num_blocks)
        combined = CombinedDrafter(NgramDrafter(), head)
        inlet = self.inlet = Inlet(options.states_endpoint, StateMessage, combined.take)

        def answer(work: DraftWork) -> DraftResult:
            # The states left before the word that they are there, but on another socket.
            while work.states and work.rows and head.last_step < work.step:
                if inlet.take(STATES_TIMEOUT_S) is None:
                    break
            return combined.run(work)

        return answer


def _traced(run: Callable[[DraftWork], DraftResult], spans: RowSpans) -> Callable[[DraftWork], DraftResult]:
    def run_and_note(work: DraftWork) -> DraftResult:
        spans.leave(work.leaves)
        for row in work.rows:
            spans.join(row.row, row.traceparent)
        begin = time.perf_counter()
        result = run(work)
        spans.note((row.row for row in work.rows), time.perf_counter() - begin)
        return result

    return run_and_note


class DraftLink:
    """`tailserve.engine.speculation.drafter.Drafter` over a draft process.

    A draft that dies or hangs is started again by a thread of its own; until it is back there are no drafts.
    """

    def __init__(
        self,
        options: DraftOptions,
        *,
        sockets: Sockets,
        bundle_index: int = 2,
        actor_options: dict[str, Any],
        load_timeout_s: float,
        hang_s: float,
    ) -> None:
        self.process: ModelProcess[DraftWork, DraftResult] = ModelProcess(
            "draft",
            DraftActor,
            load_options=options,
            incoming=DraftResult,
            sockets=sockets,
            bundle_index=bundle_index,
            actor_options=actor_options,
            load_timeout_s=load_timeout_s,
        )
        self.incarnation = 0
        self._hang_s = hang_s
        self._up = False
        self._asked_at = 0.0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Starts the draft; raises what its loading raises."""
        self.process.start()
        self._come_up()

    def send(self, work: DraftWork) -> bool:
        channel = self._live_channel()
        if channel is None or not channel.send(work):
            return False
        self._asked_at = time.monotonic()
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        deadline = time.monotonic() + timeout_s
        while (channel := self._live_channel()) is not None:
            result: DraftResult | None = channel.receive(max(deadline - time.monotonic(), 0.0))
            if result is None:
                if time.monotonic() - self._asked_at > self._hang_s:
                    self._go_down("hangs")
                return None
            if result.number == number:
                return result
        return None

    def stop(self) -> None:
        self._stopped.set()
        self.process.kill()

    def _live_channel(self) -> Channel[DraftWork, DraftResult] | None:
        if not self._up:
            return None
        if self.process.ended:
            self._go_down("ended")
            return None
        return self.process.channel

    def _go_down(self, what: str) -> None:
        logger.error("the draft process %s; serving goes on without it until it is back", what)
        self._up = False
        self.incarnation += 1
        threading.Thread(target=self._bring_back, name="draft-restart", daemon=True).start()

    def _bring_back(self) -> None:
        while not self._stopped.is_set():
            self.process.kill()
            try:
                self.process.start()
            except Exception:
                logger.exception("the draft could not be restarted; next attempt in %g s", RETRY_S)
                self._stopped.wait(RETRY_S)
            else:
                self._come_up()
                return

    def _come_up(self) -> None:
        self.incarnation += 1
        self._up = True
