"""What everything but the engine step adds to the time to first token, at concurrency 1.

Run: python tests/benchmarks/first_token.py [--requests N]

Starts the demo model on this machine and asks for one token at a time. The verifier's own time comes from the router's
statistics; the rest is HTTP, Ray Serve, tokenizer, scheduler and channels. Also printed: a Serve handle's bare
round trip, and the same request to the ingress without the model (/v1/models), so that the parts can be told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

import ray
from harness import MODEL, Server, free_port
from ray import serve

from tailserve.cluster.config import parse_config
from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.app import build_app


async def measure(server: Server, count: int) -> None:
    body = {"model": MODEL, "prompt": "The quick brown fox jumps over", "max_tokens": 1, "stream": True, "temperature": 0}
    totals, added, models, calls = [], [], [], []
    async with httpx.AsyncClient(base_url=server.url) as client:
        for number in range(count + 20):
            before = (await server.status())["stats"]["verifier_seconds"]
            begin = time.perf_counter()
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        break
                total = time.perf_counter() - begin
            begin = time.perf_counter()
            await client.get("/v1/models")
            bare = time.perf_counter() - begin
            begin = time.perf_counter()
            after = (await server.status())["stats"]["verifier_seconds"]
            call = time.perf_counter() - begin
            if number >= 20:
                totals.append(total)
                added.append(total - (after - before))
                models.append(bare)
                calls.append(call)
    print(f"RAY_SERVE_*: {prepare_serve()}")
    for name, values in (
        ("time to first token", totals),
        ("of which not the verifier", added),
        ("GET /v1/models (HTTP, proxy, ingress)", models),
        ("one Serve handle call, from this process", calls),
    ):
        p50, p99 = np.percentile(np.array(values) * 1e3, [50, 99])
        print(f"{name:45} p50 {p50:7.2f} ms   p99 {p99:7.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    prepare_serve()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build_app(parse_config({"max_model_len": 1024})), name="tailserve", route_prefix="/")
        server = Server(f"http://127.0.0.1:{port}")
        while httpx.get(f"{server.url}/ready").status_code != 200:
            time.sleep(0.2)
        asyncio.run(measure(server, args.requests))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
