"""Metrics by the GenAI conventions, as a collector gets them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from collector import Collector, attributes
from edge import Edge

from tailserve.cluster.settings import settings
from tailserve.deployments.otlp_metrics import GenAiMetrics, open_metrics

NAMES = {"gen_ai.server.request.duration", "gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


async def test_a_collector_gets_what_each_answer_took(tmp_path: Path, collector: Collector) -> None:
    edge, metrics = Edge(tmp_path), GenAiMetrics(f"{collector.url}/v1/metrics", "tiny")
    edge.service.note_end = metrics.note
    await edge.open()
    await edge.client.completions.create(model="tiny", prompt="ab", max_tokens=5, n=2)
    await edge.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "secret"}], max_tokens=5, service_tier="priority"
    )
    await edge.close()
    metrics.close()
    assert set(collector.metrics) == NAMES
    for metric in collector.metrics.values():
        assert metric.unit == "s"
        points = {attributes(point)["gen_ai.operation.name"]: point for point in metric.exponential_histogram.data_points}
        assert {name: point.count for name, point in points.items()} == {"text_completion": 2, "chat": 1}
        assert attributes(points["chat"])["tailserve.slo_class"] == "critical"
        assert attributes(points["chat"])["gen_ai.request.model"] == "tiny"
        assert "secret" not in str(metric)


def test_an_endpoint_comes_from_the_configuration_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert open_metrics(None, "tiny") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9/")
    assert settings().otlp_metrics_endpoint == "http://127.0.0.1:9/v1/metrics"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:8/m")
    assert settings().otlp_metrics_endpoint == "http://127.0.0.1:8/m"
