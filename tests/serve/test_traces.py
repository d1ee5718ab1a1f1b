"""A request's trace over all its processes, as a collector gets it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
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


class Collector:
    """Takes traces over HTTP."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        """With the process of each."""
        taken = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                    process = attributes(resource.resource)["tailserve.process"]
                    for scope in resource.scope_spans:
                        taken.spans += [(process, span) for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(thing: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in thing.attributes}


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
        "otlp_traces_endpoint": collector.url,
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
