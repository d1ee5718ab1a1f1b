"""A request's trace over all its processes, as a collector gets it; and its line of log."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from collector import Collector, attributes
from ray import serve
from tiny import save_tiny

from tailserve.cluster.config import parse_config
from tailserve.deployments.app import build_app

NAME = "traces"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SPANS = {
    "ingress": {"text_completion tiny"},
    "router": {"queue", "prefill", "decode"},
    "verifier": {"verify"},
    "draft": {"draft"},
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def url(ray_cluster: int, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[str]:
    config = {
        "model": save_tiny(tmp_path_factory.mktemp("tiny")),
        "dtype": "float32",
        "served_model_name": "tiny",
        "speculation": 2,
        "num_kv_blocks": 200,
        "otlp_traces_endpoint": f"{collector.url}/v1/traces",
        "otlp_metrics_endpoint": f"{collector.url}/v1/metrics",
        "log_format": "json",
        "log_requests": "all",
    }
    serve.run(build_app(parse_config(config)), name=NAME, route_prefix=f"/{NAME}")
    yield f"http://127.0.0.1:{ray_cluster}/{NAME}"
    serve.delete(NAME)


async def test_one_tree_over_four_processes_says_where_the_time_went(url: str, collector: Collector) -> None:
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 20,
        "temperature": 0,
        "ignore_eos": True,
        "session_id": "s",
    }
    async with httpx.AsyncClient(timeout=60) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = await client.post(f"{url}/v1/completions", json=body, headers=headers)
        # That of another: rows that ended are told of with the next step.
        await client.post(f"{url}/v1/completions", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    expected = {(process, name) for process, names in SPANS.items() for name in names}
    deadline = time.monotonic() + 20
    while {(process, span.name) for process, span in collector.spans} != expected:
        assert time.monotonic() < deadline, collector.spans
        await asyncio.sleep(0.2)
    assert len(collector.spans) == len(expected), "the second is not to be traced"
    by_name = {span.name: span for _, span in collector.spans}
    root = by_name.pop("text_completion tiny")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert all((span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id) for span in by_name.values())
    said = attributes(root)
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.conversation.id"] == "s"
    assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == 20
    assert said["gen_ai.response.id"] == answer.json()["id"]
    assert 0 < said["gen_ai.response.time_to_first_chunk"] < 10
    assert "Once" not in str(collector.spans)
    # Queue, prefill and decode follow each other, inside of the request.
    parts = [by_name[name] for name in ("queue", "prefill", "decode")]
    moments = [moment for span in parts for moment in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert moments == sorted(moments)
    slack = 50_000_000
    assert root.start_time_unix_nano - slack <= moments[0]
    assert moments[-1] <= root.end_time_unix_nano + slack
    assert attributes(by_name["verify"])["tailserve.steps"] == attributes(by_name["decode"])["tailserve.steps"]


async def test_the_log_has_an_object_for_each_request_with_its_id(url: str) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"prompt": "A secret", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        answer = await client.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    said = await asyncio.to_thread(_logged)
    (line,) = [entry for entry in said if entry.get("request_id") == "mine"]
    assert (line["client_request_id"], line["finish_reason"], line["output_tokens"]) == ("mine", "length", 3)
    assert line["ttft_s"] > 0
    assert "secret" not in str(said)


def _logged() -> list[dict[str, Any]]:
    """The ingress' log."""
    (file,) = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve").glob(f"replica_{NAME}_Ingress_*.log")
    return [json.loads(line) for line in file.read_text().splitlines()]
