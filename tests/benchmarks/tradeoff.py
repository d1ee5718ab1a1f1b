"""What tight targets cost: tokens a second in overload, with critical targets of 30 to 80 ms a token and without classes.

Run: python tests/benchmarks/tradeoff.py [--rounds 3] [--seconds 60] [--plot FILE] [--json FILE]

The traffic is that of open_loop.py at twice the capacity, which is measured first. A server without classes (first come,
first served) and one with them take turns, one stopped while the other is measured. Tokens of the first seconds, while the
batch fills, do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import contestants
from contestants import Contestant
from open_loop import CRITICAL, NORMAL, capacity

from tailserve.deployments.bench.load import Client, open_loop
from tailserve.deployments.bench.report import table

TARGETS_MS = (30, 40, 60, 80)
NONE = "no classes"
FILLING_S = 20.0
ENOUGH = 0.95
_CLASS = "  - {{name: {name}, priority: {priority}, ttft_s: {ttft_s}, tpot_s: {tpot_s}, speculation: 'off'}}\n"
_CLASSES = "".join(_CLASS.format(name=f"critical-{ms}", priority=0, ttft_s=0.5, tpot_s=ms / 1e3) for ms in TARGETS_MS)
_CLASSES += _CLASS.format(name="normal", priority=10, ttft_s=5, tpot_s=0.2)
CONFIG = (
    f"slo_classes:\n{_CLASSES}default_class: normal\nurgent_class: critical-40\nservice_tiers: {{}}\nmax_model_len: 4096\n"
)


async def measure(server: Contestant, rate: float, slo_class: str, seconds: float, seed: int) -> dict[str, float]:
    """Tokens a second in all, and how the critical requests that ended fared."""
    critical = replace(CRITICAL, headers={"X-SLO-Class": slo_class}, body={})
    with server.awake() as url:
        async with Client(url) as client:
            load = open_loop(client, [critical, NORMAL], rate=rate, duration_s=seconds, seed=seed, drain_s=0)
            arriving = asyncio.create_task(load)
            await asyncio.sleep(FILLING_S)
            (before, begin), _ = await asyncio.gather(_generated(server), asyncio.sleep(seconds - FILLING_S))
            after, end = await _generated(server)
            samples = await arriving
    paces = sorted(1e3 * s.tpot for s in samples if s.workload == CRITICAL.name and s.error is None)
    return {
        "tokens_per_s": (after - before) / (end - begin),
        "critical_TPOT_p99_ms": paces[int(0.99 * len(paces))] if paces else float("nan"),
        "critical_ended": len(paces),
    }


async def _generated(server: Contestant) -> tuple[float, float]:
    """Tokens that a server has generated so far, and when that was."""
    return await asyncio.to_thread(server.counter, "tailserve_generation_tokens_total"), time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="tradeoff-"))
    print(f"logs: {logs}")
    (logs / "classes.yaml").write_text(CONFIG)
    (logs / "none.yaml").write_text(CONFIG + "scheduling_policy: fcfs\n")
    rows: dict[str, list[dict[str, float]]] = {NONE: []} | {f"{ms} ms": [] for ms in TARGETS_MS}
    with (
        contestants.tailserve(logs, "--config", str(logs / "none.yaml")) as without,
        contestants.tailserve(logs, "--config", str(logs / "classes.yaml")) as classes,
    ):
        rate = 2 * asyncio.run(capacity(without))
        print(f"{rate:.2f} requests/s arrive, twice what we complete", flush=True)
        for turn in range(args.rounds):
            # The widest target, which must cost next to nothing, beside what it is compared with: machines drift in minutes.
            targets = reversed(TARGETS_MS)
            order = [(NONE, without, "critical-80"), *((f"{ms} ms", classes, f"critical-{ms}") for ms in targets)]
            for label, server, name in order if turn % 2 == 0 else reversed(order):
                rows[label].append(asyncio.run(measure(server, rate, name, args.seconds, turn)))
                print(f"  {label}: {rows[label][-1]['tokens_per_s']:.0f} tok/s", flush=True)
    summary = []
    for label, runs in rows.items():
        shares = [100 * run["tokens_per_s"] / none["tokens_per_s"] for run, none in zip(runs, rows[NONE], strict=True)]
        row = {"critical target": label} | {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        summary.append(row | {"of_no_classes_%": statistics.median(shares), "least_%": min(shares), "most_%": max(shares)})
    print(table(summary, list(summary[0])))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        _plot(args.plot, summary)


def _plot(path: Path, summary: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    none, *targets = summary
    pyplot.figure(figsize=(6, 4))
    pyplot.plot(TARGETS_MS, [row["tokens_per_s"] for row in targets], "o-", label="with classes")
    pyplot.axhline(none["tokens_per_s"], linestyle=":", color="k", label=NONE)
    pyplot.axhline(ENOUGH * none["tokens_per_s"], linestyle=":", color="r", label=f"{ENOUGH:.0%} of it")
    pyplot.xlabel("critical target, ms a token")
    pyplot.ylabel("tokens a second in all")
    pyplot.ylim(0)
    pyplot.legend()
    pyplot.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
