"""Metrics by OpenTelemetry's GenAI conventions, sent to a collector; without an endpoint there are none."""

from __future__ import annotations

from tailserve.cluster.settings import settings
from tailserve.deployments.generation import Choice
from tailserve.deployments.tracing import resource
from tailserve.engine.types import FinishReason


class GenAiMetrics:
    """Exponential histograms, whose buckets are a few percent wide whatever the latency."""

    def __init__(self, endpoint: str, model: str) -> None:
        """`endpoint`: a collector's URL for metrics over HTTP. How often it hears of them is OpenTelemetry's own setting."""
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import Histogram, MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.metrics.view import Aggregation, ExponentialBucketHistogramAggregation

        fine: dict[type, Aggregation] = {Histogram: ExponentialBucketHistogramAggregation()}
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint, preferred_aggregation=fine))
        self._provider = MeterProvider([reader], resource("ingress"))
        make = self._provider.get_meter("tailserve").create_histogram
        self._whole = make("gen_ai.server.request.duration", "s", "To the last token")
        self._ttft = make("gen_ai.server.time_to_first_token", "s", "From the arrival of a request to its first token")
        self._tpot = make("gen_ai.server.time_per_output_token", "s", "Behind the first")
        self._model = model

    def note(self, choice: Choice, reason: FinishReason) -> None:
        """A choice ended. What its client gave up says nothing, nor does what got no token."""
        if reason is FinishReason.ABORT or choice.ttft_s is None:
            return
        attributes = {
            "gen_ai.operation.name": choice.operation,
            "gen_ai.provider.name": "tailserve",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "tailserve.slo_class": choice.request.slo_class,
        }
        if reason is FinishReason.ERROR:
            attributes["error.type"] = "internal_error"
        else:
            self._ttft.record(choice.ttft_s, attributes)
            self._tpot.record(choice.tpot_s, attributes)
        self._whole.record(choice.whole_s, attributes)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def open_metrics(endpoint: str | None, model: str) -> GenAiMetrics | None:
    """None without an endpoint, neither configured nor in OpenTelemetry's own variables."""
    found = endpoint or settings().otlp_metrics_endpoint
    return GenAiMetrics(found, model) if found else None
