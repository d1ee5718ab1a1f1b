"""What tailserve counts. Names are those of vLLM where it has the same thing.

Labels are bounded: the model, the class, an end's or a refusal's reason, the instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tailserve.deployments.generation import Choice
from tailserve.deployments.metrics import Metric, Page, buckets
from tailserve.engine.engine import Engine
from tailserve.engine.errors import InvalidRequestError, QueueFullError, TailserveError
from tailserve.engine.types import FinishReason, Request, SloClass

REQUEST_S = buckets(0.001, 300)
TOKEN_S = buckets(0.0005, 20)


class RequestMetrics:
    """Of an ingress: how its requests went, as their users felt it."""

    def __init__(self, page: Page, classes: Mapping[str, SloClass]) -> None:
        self.page, self._classes = page, classes
        self._attained = page.counter(
            "slo_attained", "Answers whose first token and pace met their class's targets", "slo_class"
        )
        self._missed = page.counter("slo_missed", "Answers that missed one of them, or failed", "slo_class")
        self._refused = page.counter("admission_rejections", "Requests that no instance took", "slo_class", "reason")
        self._ended = page.counter("request_success", "Answers that ended, by how", "slo_class", "finished_reason")
        self._ttft = page.histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", REQUEST_S, "slo_class"
        )
        self._tpot = page.histogram(
            "request_time_per_output_token_seconds", "Of an answer, behind its first token", TOKEN_S, "slo_class"
        )
        gap = page.histogram("inter_token_latency_seconds", "From one piece to the next", TOKEN_S, "slo_class")
        self.note_gap = {name: gap.observer(slo_class=name) for name in classes}
        """Class to what is told of each pause between pieces; not for Ray, where that would cost too much."""
        self._whole = page.histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token", REQUEST_S, "slo_class"
        )
        self._parts = [
            page.histogram(f"request_{name}_time_seconds", text, REQUEST_S, "slo_class")
            for name, text in (
                ("queue", "From a request's arrival to its first step"),
                ("prefill", "From there to its first token"),
                ("decode", "From there to its last token"),
            )
        ]
        ttft = page.gauge("slo_ttft_target_seconds", "What a class asks for", "slo_class")
        tpot = page.gauge("slo_tpot_target_seconds", "What a class asks for", "slo_class")
        for slo in classes.values():
            ttft.set(slo.ttft_s, slo_class=slo.name)
            tpot.set(slo.tpot_s, slo_class=slo.name)
            # What has not counted yet is 0, not absent.
            self._attained.inc(0, slo_class=slo.name)
            self._missed.inc(0, slo_class=slo.name)

    def note_refusal(self, request: Request, error: TailserveError) -> bool | None:
        """No instance took a request. Where that is no fault of its class being full, it missed its targets.

        Returns whether its targets were met; None where nothing can be said of that.
        """
        self._refused.inc(slo_class=request.slo_class, reason=error.code)
        if isinstance(error, QueueFullError | InvalidRequestError):
            return None
        self._missed.inc(slo_class=request.slo_class)
        return False

    def note(self, choice: Choice, reason: FinishReason) -> bool | None:
        """A choice ended. What its client gave up says nothing of its pace. Returns the same as `note_refusal`."""
        slo = self._classes[choice.request.slo_class]
        self._ended.inc(slo_class=slo.name, finished_reason=reason)
        if reason is FinishReason.ABORT:
            return None
        ttft_s, in_time = choice.ttft_s, False
        if ttft_s is not None:
            self._ttft.observe(ttft_s, slo_class=slo.name)
            self._tpot.observe(choice.tpot_s, slo_class=slo.name)
            self._whole.observe(choice.whole_s, slo_class=slo.name)
            if choice.timeline is not None:
                for part, seconds in zip(self._parts, choice.timeline.parts, strict=True):
                    part.observe(seconds, slo_class=slo.name)
            in_time = ttft_s <= slo.ttft_s and choice.tpot_s <= slo.tpot_s
        met = in_time and reason is not FinishReason.ERROR
        (self._attained if met else self._missed).inc(slo_class=slo.name)
        return met


Labels = tuple[tuple[str, str], ...]
"""Names and values."""


class Reading(NamedTuple):
    """A value that an engine knows by itself."""

    name: str
    text: str
    value: float
    labels: Labels = ()
    counter: bool = True


def readings(engine: Engine) -> Iterator[Reading]:
    """All of them, as of its last step."""
    stats, gauges = engine.stats, engine.gauges()
    yield Reading("engine_steps", "Steps that were made", stats.steps)
    yield Reading("verifier_seconds", "Time the verifier spent on them", stats.verifier_seconds)
    yield Reading("prompt_tokens", "Prompt tokens of requests that started", stats.prompt_tokens)
    yield Reading("generation_tokens", "Tokens generated", stats.generated_tokens)
    yield Reading("prefix_cache_queries", "Tokens looked up in the prefix cache", stats.prefix_cache_queries)
    yield Reading("prefix_cache_hits", "Those of them that were found", stats.prefix_cache_hits)
    yield Reading("num_preemptions", "Sequences that lost their slot for a while", stats.preemptions)
    yield Reading("spec_decode_num_drafts", "Times that a sequence was drafted for", stats.drafts)
    yield Reading("spec_decode_num_draft_tokens", "Draft tokens verified, of all branches", stats.draft_tokens)
    yield Reading("spec_decode_num_accepted_tokens", "Those of them that held", stats.accepted_draft_tokens)
    for place, count in enumerate(stats.accepted_by_position.copy()):
        where = (("position", str(place)),)
        yield Reading("spec_decode_num_accepted_tokens_per_pos", "The same by their place in a draft, from 0", count, where)
    yield Reading("spec_decode_num_foreseen_drafts", "Drafts prepared while the verifier worked", stats.foreseen_drafts)
    yield Reading("spec_decode_foresight_hits", "Times that one of them was what was asked for next", stats.foresight_hits)
    yield Reading("spec_decode_foresight_misses", "Times that none was", stats.foresight_misses)
    yield Reading("draft_seconds", "Time the draft spent", stats.draft_seconds)
    yield Reading("draft_timeouts", "Steps that the draft was too late for", stats.draft_timeouts)
    yield Reading("executor_restarts", "Verifiers started anew", stats.executor_restarts)
    for quantile, error in zip(("0.5", "0.99"), engine.prediction_errors(), strict=True):
        where = (("quantile", quantile),)
        yield Reading("step_time_error_ratio", "How far off predicted step times were lately", error, where, counter=False)
    yield Reading("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1", gauges.kv_cache_usage, counter=False)
    yield Reading("host_kv_cache_usage_perc", "The same of the second tier's", gauges.host_kv_cache_usage, counter=False)
    # The engine's thread goes on, and its lists change.
    residency = engine.scheduler.residency
    lines = residency.running.copy(), residency.waiting.copy()
    running, waiting = (Counter(seq.slo.name for seq in line) for line in lines)
    for name, pace in engine.paces().items():
        where = (("slo_class", name),)
        yield Reading("num_requests_running", "Sequences that have a slot", running[name], where, counter=False)
        yield Reading("num_requests_waiting", "Sequences that wait for one", waiting[name], where, counter=False)
        yield Reading("batch_cap", "Sequences that keep a class's pace", pace.cap, where, counter=False)


class InstanceMetrics:
    """Of a router: what its engine says of itself."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._metrics: dict[str, Metric] = {}
        self._counted: dict[tuple[str, Labels], float] = {}

    def note(self, engine: Engine) -> None:
        """Takes the state of the moment."""
        for reading in readings(engine):
            labels = dict(reading.labels)
            if reading.name not in self._metrics:
                make = self._page.counter if reading.counter else self._page.gauge
                self._metrics[reading.name] = make(reading.name, reading.text, *labels)
            if reading.counter:
                key = reading.name, reading.labels
                self._metrics[reading.name].inc(reading.value - self._counted.get(key, 0.0), **labels)
                self._counted[key] = reading.value
            else:
                self._metrics[reading.name].set(reading.value, **labels)

    def text(self, engine: Engine) -> str:
        """The page of the moment."""
        self.note(engine)
        return self._page.text()
