"""Traces of requests over all processes, by OpenTelemetry; without an endpoint there are none, and nothing is done for them.

The ingress' span is the request; its `traceparent` goes with the request to the router and, by rows, to the verifier and the
draft, whose spans are its children. Attributes are those of OpenTelemetry's GenAI conventions; no text is among them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tailserve.cluster.settings import settings
from tailserve.engine.types import Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import Span

PREFIX = "tailserve."
NANO = 1e9


def resource(process: str) -> Resource:
    """Who says it: the service's name, and which of its processes."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    named = {SERVICE_NAME: settings().otel_service_name or "tailserve"}
    return Resource.create(named | {f"{PREFIX}process": process})


class Tracer:
    """Makes this process' spans."""

    def __init__(self, endpoint: str, process: str) -> None:
        """`endpoint`: a collector's URL for traces over HTTP. `process`: what this one is."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        provider = TracerProvider(resource=resource(process))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._provider = provider
        self._tracer = provider.get_tracer("tailserve")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[str, str], age_s: float) -> Span:
        """A request that came `age_s` seconds ago, under the client's own trace, if it has one."""
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(dict(headers))
        return self._tracer.start_span(name, parent, SpanKind.SERVER, start_time=time.time_ns() - int(age_s * NANO))

    def traceparent(self, span: Span) -> str:
        """What makes another process' spans its children; empty where nobody keeps them."""
        from opentelemetry.trace import set_span_in_context

        if not span.get_span_context().trace_flags.sampled:
            return ""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier["traceparent"]

    def add(self, name: str, traceparent: str, begin_ns: int, end_ns: int, attributes: Mapping[str, Any]) -> None:
        """A span that is over."""
        parent = self._propagator.extract({"traceparent": traceparent})
        names = {PREFIX + key: value for key, value in attributes.items()}
        self._tracer.start_span(name, parent, attributes=names, start_time=begin_ns).end(end_ns)

    def add_timeline(self, traceparent: str, timeline: Timeline) -> None:
        """What an engine did for a request that ends now."""
        at = time.time_ns() - int(NANO * (timeline.queue_s + timeline.prefill_s + timeline.decode_s))
        paused = {"preemptions": timeline.num_preemptions, "paused_s": timeline.paused_s, "steps": timeline.num_steps}
        parts: Iterable[tuple[str, float, dict[str, Any]]] = (
            ("queue", timeline.queue_s, {}),
            ("prefill", timeline.prefill_s, {}),
            ("decode", timeline.decode_s, paused),
        )
        for name, seconds, attributes in parts:
            end = at + int(NANO * seconds)
            self.add(name, traceparent, at, end, attributes)
            at = end

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def open_tracer(endpoint: str | None, process: str) -> Tracer | None:
    """None without an endpoint, neither configured nor in OpenTelemetry's own variables."""
    found = endpoint or settings().otlp_traces_endpoint
    return Tracer(found, process) if found else None


class RowSpans:
    """What a model process did for the rows of requests that are traced: one span from a row's first step to its last."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer, self._name = tracer, name
        self._rows: dict[int, _Row] = {}

    def join(self, row: int, traceparent: str) -> None:
        if traceparent and row not in self._rows:
            self._rows[row] = _Row(traceparent)

    def note(self, rows: Iterable[int], seconds: float) -> None:
        """A step of these rows ended, and took so long."""
        for row in rows:
            known = self._rows.get(row)
            if known is not None:
                known.note(seconds)

    def leave(self, rows: Iterable[int]) -> None:
        for row in rows:
            known = self._rows.pop(row, None)
            if known is not None and known.num_steps:
                self._tracer.add(self._name, known.traceparent, known.begin_ns, known.end_ns, known.attributes)


class _Row:
    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent
        self.begin_ns = self.end_ns = time.time_ns()
        self.num_steps = 0
        self._seconds = self._longest = 0.0

    def note(self, seconds: float) -> None:
        self.end_ns = time.time_ns()
        self.num_steps += 1
        self._seconds += seconds
        self._longest = max(self._longest, seconds)

    @property
    def attributes(self) -> dict[str, Any]:
        mean = self._seconds / max(self.num_steps, 1)
        return {"steps": self.num_steps, "step_mean_s": mean, "step_longest_s": self._longest}
