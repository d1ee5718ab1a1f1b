"""What telemetry costs, as a share of all CPU seconds of a server for 1,000 tokens.

Run: python tests/benchmarks/telemetry.py [--rounds 5] [--concurrency 8] [--requests 32] [--output 128]

What metrics and traces take is measured in this process, where nothing else is counted: the same calls for as many answers
and steps, and as many messages to a collector as four processes send. All that a server takes is measured on one, of
requests that are traced and not, by turns (these say by their `traceparent` that nobody keeps theirs); the difference is
printed, too, with the spread between rounds, below which nothing can be told.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import contestants
from contestants import Contestant

from tailserve.cluster.config import parse_config
from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.bench.load import Client, Workload, closed_loop
from tailserve.deployments.metrics import Page
from tailserve.deployments.openai import CompletionBody
from tailserve.deployments.request_span import open_span
from tailserve.deployments.telemetry import RequestMetrics
from tailserve.deployments.tracing import RowSpans, Tracer
from tailserve.engine.types import FinishReason, Timeline


class Waste(BaseHTTPRequestHandler):
    """Takes everything and keeps nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def collector() -> Iterator[str]:
    """Its URL. A process of its own, which nobody counts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Waste)
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    process.terminate()
    server.server_close()


def cpu_seconds(contestant: Contestant) -> float:
    """Of all its processes so far."""
    ticks = 0
    for pid in contestant.pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


async def measure(contestant: Contestant, args: argparse.Namespace, seed: int, *, traced: bool) -> float:
    """CPU seconds for 1,000 tokens."""
    work = Workload("load", 64, args.output, headers={"traceparent": f"00-{seed + 1:032x}-{1:016x}-{int(traced):02d}"})
    with contestant.awake() as url:
        async with Client(url) as client:
            await closed_loop(client, work, concurrency=2, requests=2, seed=seed)
            before = cpu_seconds(contestant)
            samples = await closed_loop(client, work, concurrency=args.concurrency, requests=args.requests, seed=seed + 1)
            # What is sent in the background belongs to it.
            await asyncio.sleep(6)
            spent = cpu_seconds(contestant) - before
    return 1000 * spent / sum(sample.num_tokens for sample in samples)


def metrics_seconds(output: int) -> float:
    """CPU seconds that the metrics of answers with 1,000 tokens take."""
    classes = {slo.name: slo for slo in parse_config({}).classes()}
    page = Page(model_name="m", instance="i")
    counts = RequestMetrics(page, classes)
    request = SimpleNamespace(slo_class="normal")
    choice = SimpleNamespace(request=request, ttft_s=0.2, tpot_s=0.03, whole_s=4.2, timeline=Timeline())
    begin, tokens = time.process_time(), 0
    while tokens < 100_000:
        for _ in range(output - 1):
            counts.note_gap["normal"](0.03)
        counts.note(cast(Any, choice), FinishReason.LENGTH)
        tokens += output
        # Scraped every 15 s, at some hundred tokens a second.
        if tokens % (output * 16) == 0:
            page.text()
    return 1000 * (time.process_time() - begin) / tokens


def traces_seconds(output: int, endpoint: str) -> float:
    """The same of traces. A batch is what comes between two messages to the collector, 5 s at some 100 tokens a second."""
    tracers = {name: Tracer(endpoint, name) for name in ("ingress", "router", "verifier", "draft")}
    usage = {
        "prompt_tokens": 64,
        "completion_tokens": output,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0},
    }
    generation = SimpleNamespace(usage=lambda: usage, choices=[SimpleNamespace(ttft_s=0.2, ended="length")])
    body, batch, batches = CompletionBody(prompt="x"), max(500 // output, 1), 100
    begin = time.process_time()
    for _ in range(batches):
        for _ in range(batch):
            span = open_span(tracers["ingress"], {}, body, model="m", slo_class="normal", session="s", age_s=0.0)
            for name, what in (("verifier", "verify"), ("draft", "draft")):
                rows = RowSpans(tracers[name], what)
                rows.join(1, span.traceparent)
                for _ in range(output):
                    rows.note([1], 0.02)
                rows.leave([1])
            tracers["router"].add_timeline(span.traceparent, Timeline())
            span.end(cast(Any, generation), "cmpl-x")
        for tracer in tracers.values():
            tracer._provider.force_flush()
    spent = time.process_time() - begin
    for tracer in tracers.values():
        tracer.close()
    return 1000 * spent / (batches * batch * output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output", type=int, default=128)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="telemetry-"))
    print(f"logs: {logs}; RAY_SERVE_*: {prepare_serve()}")
    flags = ["--speculation", "off"]
    spent: dict[str, list[float]] = {"off": [], "traced": []}
    with collector() as url, contestants.tailserve(logs, *flags, "--otlp-traces-endpoint", url) as server:
        of_traces = traces_seconds(args.output, url)
        for number in range(args.rounds):
            for name, values in spent.items():
                values.append(asyncio.run(measure(server, args, 10 * number, traced=name == "traced")))
            print(
                f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in spent.items()),
                flush=True,
            )
    of_metrics = metrics_seconds(args.output)
    ratios = [with_traces / without for with_traces, without in zip(spent["traced"], spent["off"], strict=True)]
    whole = statistics.median(spent["off"])
    print(f"CPU seconds for 1,000 tokens: {whole:.2f} (from {min(spent['off']):.2f} to {max(spent['off']):.2f})")
    print(f"of them metrics: {of_metrics:.4f} = {100 * of_metrics / whole:.2f}%")
    print(f"of them traces, where all requests have one: {of_traces:.4f} = {100 * of_traces / whole:.2f}%")
    print(f"a traced round against the one before it: {', '.join(f'{100 * (ratio - 1):+.1f}%' for ratio in sorted(ratios))}")


if __name__ == "__main__":
    main()
