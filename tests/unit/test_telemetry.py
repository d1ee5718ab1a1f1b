"""What is counted of requests, and what is not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from edge import Edge

from tailserve.deployments import telemetry
from tailserve.deployments.telemetry import RequestMetrics
from tailserve.engine.types import SloClass


class Metric:
    """As Ray's, but here."""

    values: ClassVar[Counter[str]] = Counter()

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name.removeprefix("tailserve_")

    def inc(self, count: float, labels: dict[str, str]) -> None:
        Metric.values[f"{self.name} {labels['slo_class']}"] += int(count)

    def observe(self, value: float, labels: dict[str, str]) -> None:
        assert value >= 0
        self.inc(1, labels)


@pytest.fixture
async def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    Metric.values.clear()
    for kind in ("Counter", "Histogram"):
        monkeypatch.setattr(telemetry.metrics, kind, Metric)
    edge = Edge(tmp_path)
    edge.service.note_end = RequestMetrics(
        "tiny",
        {
            "normal": SloClass(name="normal", priority=1, ttft_s=60.0, tpot_s=60.0),
            "critical": SloClass(name="critical", priority=0, ttft_s=0.0, tpot_s=60.0),
        },
    ).note
    await edge.open()
    yield edge
    await edge.close()


async def test_every_answer_counts_once_by_its_class_and_whether_it_was_in_time(counted: Edge) -> None:
    await counted.client.completions.create(model="tiny", prompt="ab", max_tokens=5, n=2)
    await counted.client.completions.create(model="tiny", prompt="ab", max_tokens=5, extra_body={"priority": -1})
    assert Metric.values["slo_attained normal"] == 2
    assert Metric.values["slo_missed critical"] == 1
    assert Metric.values["time_to_first_token_seconds normal"] == 2
    assert Metric.values["slo_missed normal"] == Metric.values["slo_attained critical"] == 0


async def test_who_leaves_counts_for_nothing(counted: Edge) -> None:
    counted.calls.executor.step_s = 0.005
    async with counted.http.stream(
        "POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 90, "stream": True}
    ) as answer:
        async for _ in answer.aiter_lines():
            break
    await counted.settle()
    assert Metric.values.total() == 0
