"""Closed loop against vLLM's CPU build: the same client, model, machine and run, taking turns.

Run: tests/benchmarks/install_peers vllm, then
     python tests/benchmarks/against_vllm.py [--rounds 3] [--json FILE] [--flags "--speculation off"]

128 random tokens in, 128 out, greedy, end of sequence ignored, speculation off. While one server is measured the other's
processes are stopped. Figures are medians over the rounds of each round's own percentile; ratios are taken in each round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import contestants
from contestants import Contestant

from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.bench.load import Client, Workload, closed_loop
from tailserve.deployments.bench.report import summarize, table

CONCURRENCIES = (1, 8, 32)
REQUESTS = {1: 4, 8: 16, 32: 64}
WORKLOAD = Workload("closed", 128, 128)
WARM_UP = Workload("warm-up", 128, 16)
COLUMNS = ["server", "load", "tokens_per_s"] + [f"{m}_p{p}_ms" for m in ("TTFT", "TPOT", "ITL") for p in (50, 95, 99)]
TARGETS = {1: 1.5, 8: 1.3, 32: 1.2}


async def measure(contestant: Contestant, number: int) -> list[dict[str, Any]]:
    rows = []
    with contestant.awake() as url:
        async with Client(url) as client:
            # As many at once as in the measurement: servers compile for the batch shapes they meet.
            await closed_loop(client, WARM_UP, concurrency=32, requests=64, seed=1000 + number)
            for concurrency in CONCURRENCIES:
                before, begin, own = contestant.cpu_seconds(), time.perf_counter(), time.process_time()
                samples = await closed_loop(
                    client, WORKLOAD, concurrency=concurrency, requests=REQUESTS[concurrency], seed=number
                )
                seconds = time.perf_counter() - begin
                after = contestant.cpu_seconds()
                shares = {name: 100 * (used - before.get(name, 0.0)) / seconds for name, used in after.items()}
                figures = summarize(samples, seconds)
                errors = {s.error for s in samples if s.error}
                if errors:
                    raise SystemExit(f"{contestant.name} failed: {errors}")
                rows.append(
                    {"server": contestant.name, "load": f"c={concurrency}", "round": number}
                    | figures
                    | {"client_cpu_%": 100 * (time.process_time() - own) / seconds, "cpu_%": shares}
                )
    return rows


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = sorted({(row["load"], row["server"]) for row in rows}, key=lambda key: (int(key[0][2:]), key[1]))
    result = []
    for load, server in keys:
        group = [row for row in rows if (row["load"], row["server"]) == (load, server)]
        numbers = {k: statistics.median(r[k] for r in group) for k, v in group[0].items() if isinstance(v, float)}
        result.append({"server": server, "load": load} | numbers)
    return result


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The lines this benchmark exists for: the median of the rounds' own ratios, their range, and the medians' ratio.

    Both servers of a round ran within minutes of each other and the machine's own speed drifts, so the first one judges;
    the other is there for who distrusts it.
    """
    at = {(row["server"], int(row["load"][2:]), row["round"]): row for row in rows}
    rounds = sorted({row["round"] for row in rows})

    def ratios(name: str, concurrency: int) -> list[float]:
        return [at["tailserve", concurrency, n][name] / at["vllm", concurrency, n][name] for n in rounds]

    def of_medians(name: str, concurrency: int) -> float:
        ours, peer = (statistics.median(at[s, concurrency, n][name] for n in rounds) for s in ("tailserve", "vllm"))
        return ours / peer

    lines = [
        (f"throughput at c={c} at least {least}x vLLM's", "tokens_per_s", c, lambda r, least=least: r >= least)
        for c, least in TARGETS.items()
    ]
    lines += [(f"{m} p99 at c=32 no worse than vLLM's", f"{m}_p99_ms", 32, lambda r: r <= 1) for m in ("TPOT", "ITL")]
    lines.append(("TTFT p50 at c=1 at most 0.6x vLLM's", "TTFT_p50_ms", 1, lambda r: r <= 0.6))
    texts = []
    for text, name, concurrency, holds in lines:
        values = ratios(name, concurrency)
        middle = statistics.median(values)
        word = "holds" if holds(middle) else "SHORT"
        spread = f"({min(values):.2f} to {max(values):.2f}; ratio of medians {of_medians(name, concurrency):.2f}x)"
        texts.append(f"{word}  {text}: {middle:.2f}x {spread}")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="--speculation off --max-model-len 4096", help="of tailserve serve")
    parser.add_argument("--vllm-flags", default="--max-model-len 4096 --no-enable-prefix-caching")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="against-vllm-"))
    print(f"logs: {logs}")
    rows: list[dict[str, Any]] = []
    serve_environment = prepare_serve()
    with (
        contestants.tailserve(logs, *shlex.split(args.flags)) as ours,
        contestants.vllm(logs, *shlex.split(args.vllm_flags)) as peer,
    ):
        for number in range(args.rounds):
            for contestant in (ours, peer) if number % 2 == 0 else (peer, ours):
                rows += asyncio.run(measure(contestant, number))
                print(table(rows[-len(CONCURRENCIES) :], COLUMNS), flush=True)
                busiest = sorted(rows[-1]["cpu_%"].items(), key=lambda item: -item[1])[:8]
                print("CPU at c=32: " + ", ".join(f"{name} {share:.0f}%" for name, share in busiest), flush=True)
    middle = medians(rows)
    print(f"\nmedians of {args.rounds} rounds; RAY_SERVE_*: {serve_environment}")
    print(table(middle, [*COLUMNS, "client_cpu_%"]))
    print("\n".join(verdicts(rows)))
    if args.json:
        args.json.write_text(json.dumps({"rounds": rows, "medians": middle}, indent=1) + "\n")


if __name__ == "__main__":
    main()
