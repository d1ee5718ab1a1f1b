"""Two classes of requests at fixed rates, below what the servers can take, near it and over it: ours and vLLM's in turn.

Run: tests/benchmarks/install_peers vllm, then
     python tests/benchmarks/open_loop.py [--seconds 30] [--load 0.5 0.9 1.5] [--json FILE]

A quarter is critical (60 tokens in, 48 out), the rest normal (200 in, 192 out); arrivals are Poisson. Loads are multiples of
what vLLM completes when it is saturated, measured first, and the same for both. While one is measured the other is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import contestants
from contestants import Contestant

from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.bench.load import Client, Workload, closed_loop, open_loop
from tailserve.deployments.bench.report import attainment, plot_tails, summarize, table

CRITICAL = Workload("critical", 60, 48, 0.25, headers={"X-SLO-Class": "critical"}, body={"priority": -1})
NORMAL = Workload("normal", 200, 192, 0.75, headers={"X-SLO-Class": "normal"}, body={"priority": 0})
COLUMNS = ["server", "load", "requests", "failed", "tokens_per_s"]
COLUMNS += [f"{name}_p{p}_ms" for name in ("TTFT", "TPOT") for p in (50, 95, 99)] + ["met_%", "client_cpu_%"]
TTFT_S, TPOT_S = 0.5, 0.08


async def capacity(contestant: Contestant) -> float:
    """Normal-sized requests a second, with more users than slots."""
    with contestant.awake() as url:
        async with Client(url) as client:
            begin = time.perf_counter()
            await closed_loop(client, NORMAL, concurrency=64, requests=96, seed=3)
            # Critical ones cost about a quarter of a normal one.
            return 96 / (time.perf_counter() - begin) / (0.75 + 0.25 * 0.25)


async def measure(
    contestant: Contestant, rate: float, label: str, seconds: float, seed: int
) -> tuple[list[Any], dict[str, Any]]:
    rows, groups = [], {}
    with contestant.awake() as url:
        async with Client(url) as client:
            await closed_loop(client, CRITICAL, concurrency=8, requests=16, seed=seed + 500)
            begin, own = time.perf_counter(), time.process_time()
            samples = await open_loop(client, [CRITICAL, NORMAL], rate=rate, duration_s=seconds, seed=seed)
            took = time.perf_counter() - begin
            share = 100 * (time.process_time() - own) / took
    for name in ("critical", "normal"):
        group = [sample for sample in samples if sample.workload == name]
        groups[f"{contestant.name} {label} {name}"] = group
        met = 100 * attainment(group, ttft_s=TTFT_S, tpot_s=TPOT_S)
        row = {"server": contestant.name, "load": f"{label} {name}"} | summarize(group, took)
        rows.append(row | {"met_%": met, "client_cpu_%": share})
    return rows, groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.9, 1.5])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG of the latency tails")
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="open-loop-"))
    print(f"logs: {logs}; RAY_SERVE_*: {prepare_serve()}")
    rows: list[dict[str, Any]] = []
    groups: dict[str, Any] = {}
    with (
        contestants.tailserve(logs, "--speculation", "off", "--max-model-len", "4096") as ours,
        contestants.vllm(logs, "--max-model-len", "4096", "--scheduling-policy", "priority", "--max-num-seqs", "64") as peer,
    ):
        able = {contestant.name: asyncio.run(capacity(contestant)) for contestant in (peer, ours)}
        print("saturated, requests/s: " + ", ".join(f"{name} {value:.2f}" for name, value in able.items()), flush=True)
        for number, load in enumerate(args.load):
            rate = load * able["vllm"]
            for contestant in (ours, peer) if number % 2 == 0 else (peer, ours):
                some, group = asyncio.run(measure(contestant, rate, f"{rate:.2f}/s", args.seconds, number))
                rows += some
                groups |= group
                print(table(some, COLUMNS), flush=True)
    print(f"\nmet: first token within {TTFT_S:g} s and {1e3 * TPOT_S:g} ms a token")
    print(table(sorted(rows, key=lambda row: (float(row["load"].split("/")[0]), row["load"], row["server"])), COLUMNS))
    if args.json:
        args.json.write_text(json.dumps({"saturated": able, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot_tails(groups, args.plot)


if __name__ == "__main__":
    main()
