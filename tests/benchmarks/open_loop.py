"""Two classes of requests arriving at random, against vLLM's CPU build with its priority scheduling.

Run: tests/benchmarks/install_peers vllm, then
     python tests/benchmarks/open_loop.py [--critical 100] [--load 0.5 0.9 2.0] [--alone] [--plot FILE] [--json FILE]

A quarter of the requests is critical (60 tokens in, 48 out), the others are normal (200 in, 192 out). Loads are shares of
what we complete when we are saturated, measured first, and the same for both servers; while one is measured the other is
stopped. Each load lasts as long as so many critical requests take to come on average, twice as many above capacity.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import tempfile
import time
from contextlib import ExitStack
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
COLUMNS += [f"{name}_p{p}_ms" for name in ("TTFT", "TPOT") for p in (50, 95, 99)]
COLUMNS += ["ITL_p99_ms", "met_%", "oldest_s", "client_cpu_%"]
TARGETS = {"critical": (0.5, 0.04), "normal": (5.0, 0.2)}
"""Seconds to the first token, and per token."""


async def capacity(contestant: Contestant) -> float:
    """Requests a second of the mix, from normal ones alone, with as many users as slots."""
    with contestant.awake() as url:
        async with Client(url) as client:
            begin = time.perf_counter()
            await closed_loop(client, NORMAL, concurrency=64, requests=96, seed=3)
            # Critical ones cost about a quarter of a normal one.
            return 96 / (time.perf_counter() - begin) / (0.75 + 0.25 * 0.25)


async def measure(
    contestant: Contestant, rate: float, label: str, seconds: float, seed: int, drain_s: float
) -> tuple[list[Any], dict[str, Any]]:
    rows, groups = [], {}
    with contestant.awake() as url:
        # In overload a first token may take as long as all arrivals and the drain.
        async with Client(url, read_timeout_s=seconds + drain_s) as client:
            await closed_loop(client, CRITICAL, concurrency=8, requests=16, seed=seed + 500)
            begin, own = time.perf_counter(), time.process_time()
            samples = await open_loop(client, [CRITICAL, NORMAL], rate=rate, duration_s=seconds, seed=seed, drain_s=drain_s)
            took = time.perf_counter() - begin
            share = 100 * (time.process_time() - own) / took
    for name, (ttft_s, tpot_s) in TARGETS.items():
        group = [sample for sample in samples if sample.workload == name]
        groups[f"{contestant.name} {label} {name}"] = group
        met = 100 * attainment(group, ttft_s=ttft_s, tpot_s=tpot_s)
        row = {"server": contestant.name, "load": f"{label} {name}"} | summarize(group, took)
        oldest = max((max([s.ttft, *s.gaps]) for s in group if s.pieces), default=0.0)
        rows.append(row | {"met_%": met, "oldest_s": oldest, "client_cpu_%": share})
    return rows, groups


VLLM_FLAGS = ("--max-model-len", "4096", "--scheduling-policy", "priority", "--max-num-seqs", "64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--critical", type=int, default=100, help="critical requests at each load; twice as many above 1")
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.9, 2.0])
    parser.add_argument("--drain", type=float, default=1200.0, help="seconds that answers may take after the last arrival")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--flags", default="--speculation off --max-model-len 4096", help="of tailserve serve")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG of the latency tails")
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="open-loop-"))
    print(f"logs: {logs}; RAY_SERVE_*: {prepare_serve()}")
    rows: list[dict[str, Any]] = []
    groups: dict[str, Any] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(contestants.tailserve(logs, *shlex.split(args.flags)))
        servers = [ours]
        if not args.alone:
            servers.append(stack.enter_context(contestants.vllm(logs, *VLLM_FLAGS)))
        able = asyncio.run(capacity(ours))
        print(f"saturated, we complete {able:.2f} requests/s", flush=True)
        for number, load in enumerate(args.load):
            rate = load * able
            seconds = args.critical * (2 if load > 1 else 1) / (CRITICAL.share * rate)
            for server in servers if number % 2 == 0 else servers[::-1]:
                some, group = asyncio.run(measure(server, rate, f"{load:g}", seconds, number, args.drain))
                rows += some
                groups |= group
                print(table(some, COLUMNS), flush=True)
    print("\nmet: first token and time per token within", TARGETS)
    print(table(sorted(rows, key=lambda row: (row["load"], row["server"])), COLUMNS))
    if args.json:
        args.json.write_text(json.dumps({"saturated": able, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot_tails(groups, args.plot)


if __name__ == "__main__":
    main()
