"""What is counted of requests, and what is not; and how well the buckets know the tail."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path

import pytest
from edge import Edge
from prometheus_client.parser import text_string_to_metric_families

from tailserve.deployments import metrics
from tailserve.deployments.generation import Generation
from tailserve.deployments.metrics import Gatherer, Page, merge
from tailserve.deployments.telemetry import REQUEST_S, TOKEN_S, InstanceMetrics, RequestMetrics
from tailserve.engine.types import FinishReason, Request, SamplingParams, SloClass, TokenChunk

CLASSES = {
    "normal": SloClass(name="normal", priority=1, ttft_s=60.0, tpot_s=60.0),
    "critical": SloClass(name="critical", priority=0, ttft_s=0.0, tpot_s=60.0),
}


@pytest.fixture
async def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edge:  # type: ignore[misc]
    edge = Edge(tmp_path)
    page, instance = Page(model_name="tiny", instance="front"), InstanceMetrics(Page(model_name="tiny", instance="back"))
    counts = RequestMetrics(page, CLASSES)
    edge.service.note_end, edge.router.on_refusal = counts.note, counts.note_refusal

    async def pages() -> list[str]:
        return [page.text(), instance.text(edge.calls.engine)]

    monkeypatch.setattr(metrics, "FRESH_S", -1.0)
    edge.service.metrics, edge.service.note_gap = Gatherer({"all": pages}).text, counts.note_gap
    await edge.open()
    yield edge  # type: ignore[misc]
    await edge.close()


async def values(edge: Edge) -> dict[tuple[str, str], float]:
    """By metric, and class or instance."""
    text = (await edge.http.get("/metrics")).text
    return {
        (sample.name.removeprefix("tailserve_"), sample.labels.get("slo_class", sample.labels["instance"])): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("read_on", [True, False])
async def test_a_last_piece_does_not_wait_for_what_is_counted_of_its_answer(edge: Edge, read_on: bool) -> None:
    request = Request(id="r/u/0", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=3, seed=0), slo_class="normal")
    ended = []
    generation = Generation(edge.router, edge.service._text, [request], stops=[])
    generation.on_end = lambda choice, reason: ended.append((choice.num_tokens, reason))
    await generation.start()
    pieces = generation.pieces()
    while (await anext(pieces)).finish_reason is None:
        pass
    assert not ended
    if read_on:
        assert await anext(pieces, None) is None
    else:
        await pieces.aclose()  # type: ignore[attr-defined]
    assert ended == [(3, FinishReason.LENGTH)]


async def test_every_answer_counts_once_by_its_class_and_whether_it_was_in_time(counted: Edge) -> None:
    await counted.client.completions.create(model="tiny", prompt="ab", max_tokens=5, n=2)
    await counted.client.completions.create(model="tiny", prompt="ab", max_tokens=5, extra_body={"priority": -1})
    found = await values(counted)
    assert found["slo_attained_total", "normal"] == 2
    assert found["slo_missed_total", "critical"] == 1
    assert found["time_to_first_token_seconds_count", "normal"] == 2
    assert found["inter_token_latency_seconds_count", "critical"] == 4
    assert found["slo_missed_total", "normal"] == found["slo_attained_total", "critical"] == 0
    assert found["generation_tokens_total", "back"] == 15
    parts = [found[f"request_{name}_time_seconds_sum", "normal"] for name in ("queue", "prefill", "decode")]
    assert 0 < sum(parts) <= found["e2e_request_latency_seconds_sum", "normal"]
    assert found["kv_cache_usage_perc", "back"] == 0
    assert 0 <= found["step_time_error_ratio", "back"] < math.inf
    assert found["spec_decode_foresight_hits_total", "back"] == found["spec_decode_foresight_misses_total", "back"] == 0


async def test_who_leaves_says_nothing_of_the_pace(counted: Edge) -> None:
    counted.calls.executor.step_s = 0.005
    async with counted.http.stream(
        "POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 90, "stream": True}
    ) as answer:
        async for _ in answer.aiter_lines():
            break
        assert (await values(counted))["num_requests_running", "normal"] == 1
    await counted.settle()
    found = await values(counted)
    assert found["request_success_total", "normal"] == 1
    assert found["slo_attained_total", "normal"] == found["slo_missed_total", "normal"] == 0
    assert found["num_requests_running", "normal"] == 0


async def test_what_goes_wrong_counts_once(counted: Edge) -> None:
    counted.calls.executor.step_s = 0.01
    answer = asyncio.create_task(counted.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 90}))
    while not counted.service._running:
        await asyncio.sleep(0.001)
    ((generation,),) = counted.service._running.values()
    (choice,) = generation.choices
    generation._queue.put_nowait(TokenChunk(choice.request.id, finish_reason=FinishReason.ERROR, error="lost"))
    assert (await answer).status_code == 500
    found = await values(counted)
    assert found["request_success_total", "normal"] == found["slo_missed_total", "normal"] == 1


async def test_a_late_source_stays_what_it_was_and_all_who_ask_share_one_answer() -> None:
    asked, late = [], False

    async def source() -> list[str]:
        asked.append(1)
        await asyncio.sleep(0)
        if late:
            raise TimeoutError
        return ["# HELP a a\n# TYPE a gauge\na 1\n"]

    gatherer = Gatherer({"source": source})
    texts = await asyncio.gather(*(gatherer.text() for _ in range(5)))
    assert len(asked) == 1
    late, gatherer._made_at = True, -math.inf
    assert await gatherer.text() == texts[0] != ""
    assert len(asked) == 2


def test_pages_of_several_processes_are_one() -> None:
    pages = []
    for instance in ("a", "b"):
        page = Page(model_name="m", instance=instance)
        page.counter("steps", "Steps").inc(3)
        page.gauge("full", "How full", "slo_class").set(0.5, slo_class="x")
        pages.append(page.text())
    text = merge(pages)
    assert text.count("# TYPE tailserve_steps_total counter") == 1
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert [(sample.name, sample.labels["instance"]) for sample in samples] == [
        (name, instance) for name in ("tailserve_steps_total", "tailserve_full") for instance in ("a", "b")
    ]


@pytest.mark.parametrize(("bounds", "scale", "sigma"), [(REQUEST_S, 0.2, 0.9), (REQUEST_S, 2.0, 0.4), (TOKEN_S, 0.02, 0.5)])
def test_the_buckets_know_the_tail(bounds: list[float], scale: float, sigma: float) -> None:
    chance = random.Random(3)
    samples = sorted(chance.lognormvariate(math.log(scale), sigma) for _ in range(100_000))
    page = Page(model_name="m", instance="i")
    histogram = page.histogram("x_seconds", "x", bounds)
    for sample in samples:
        histogram.observe(sample)
    (family,) = text_string_to_metric_families(page.text())
    counts = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
    for share, error in ((0.99, 0.05), (0.999, 0.1)):
        assert quantile(counts, share) == pytest.approx(samples[int(share * len(samples))], rel=error)


def quantile(counts: list[tuple[float, float]], share: float) -> float:
    """As PromQL's histogram_quantile: linear within a bucket."""
    rank, below, before = share * counts[-1][1], 0.0, 0.0
    for bound, count in counts:
        if count >= rank:
            return below + (bound - below) * (rank - before) / (count - before)
        below, before = bound, count
    raise AssertionError
