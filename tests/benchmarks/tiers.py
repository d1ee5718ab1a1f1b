"""Chats on a KV pool that is too small for all of them, with a second tier in host memory and without, round by round.

Each user holds a chat, with pauses between the turns, and a critical request after the other is answered beside them; or,
with --one-at-a-time, all users take turns without a pause, one request is in flight, and there are no critical ones. The
pools: "large" has room for all chats, "small" for a part of them, "two tiers" is the small one with host memory behind it.
Chats and requests are the same for each.

Run: python tests/benchmarks/tiers.py [--rounds 5] [--users 12] [--turns 8] [--only small,"two tiers"] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contestants
from contestants import Contestant
from turns import hold

from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.bench.load import Client, Sample, Workload
from tailserve.deployments.bench.report import summarize, table

CRITICAL_KEYS = ("TPOT_p50_ms", "TPOT_p99_ms", "ITL_p99_ms")
CRITICAL = Workload("critical", 32, 32, headers={"X-SLO-Class": "critical"})


@dataclass
class Round:
    """What one pool did."""

    turns: list[Sample] = field(default_factory=list)
    """Each chat's, but for its first."""
    critical: list[Sample] = field(default_factory=list)


async def measure(contestant: Contestant, args: argparse.Namespace, number: int) -> Round:
    found = Round()
    with contestant.awake() as url:
        async with Client(url) as client:
            asking = None
            if not args.one_at_a_time:
                asking = asyncio.create_task(_ask(client, found.critical, random.Random(number)))
            # Whoever waits longest is next.
            limits: dict[str, Any] = {"in_flight": asyncio.Lock()} if args.one_at_a_time else {"pause_s": args.pause}
            # Nothing of a round is found in the next.
            users = [
                hold(client, args.turns, args.answer, _chance(number, user), first=args.first, **limits)
                for user in range(args.users)
            ]
            for samples in await asyncio.gather(*users):
                found.turns += samples[1:]
            if asking is not None:
                asking.cancel()
                with suppress(asyncio.CancelledError):
                    await asking
            # A step that is interrupted by the pause would count as one that hangs.
            await asyncio.sleep(1)
    return found


def _chance(number: int, user: int) -> random.Random:
    return random.Random(1000 * number + user)


async def _ask(client: Client, samples: list[Sample], chance: random.Random) -> None:
    while True:
        sample = await client.stream(CRITICAL.request(chance), headers=CRITICAL.headers)
        if sample.error:
            raise SystemExit(f"a critical request failed: {sample.error}")
        samples.append(sample)


def report(name: str, rounds: list[Round]) -> dict[str, object]:
    """Medians over the rounds."""
    turns = [summarize(one.turns, 1.0) for one in rounds]
    critical = [summarize(one.critical, 1.0) for one in rounds if one.critical]
    asked = sum(sample.prompt_tokens for one in rounds for sample in one.turns)
    return {
        "pool": name,
        "found_%": 100 * sum(sample.cached_tokens for one in rounds for sample in one.turns) / asked,
        **{key: statistics.median(one[key] for one in turns) for key in ("TTFT_p50_ms", "TTFT_p99_ms")},
        "critical": sum(one["requests"] for one in critical),
    } | {key: statistics.median(one[key] for one in critical) for key in CRITICAL_KEYS if critical}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--first", type=int, default=150, help="words of a chat's first message")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--pause", type=float, default=10.0, help="mean seconds before each turn of a chat")
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--blocks", type=int, default=300, help="KV blocks of the small pool")
    parser.add_argument("--gib", type=float, default=1.0, help="host memory of the second tier")
    parser.add_argument("--only", default="large,small,two tiers")
    parser.add_argument("--flags", nargs="*", default=["--speculation", "off", "--max-model-len", "4096"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="tiers-"))
    print(f"logs: {logs}; RAY_SERVE_*: {prepare_serve()}")
    small = ["--num-kv-blocks", str(args.blocks)]
    pools = {"large": [], "small": small, "two tiers": [*small, "--kv-offloading-size", str(args.gib)]}
    done: dict[str, list[Round]] = {name: [] for name in args.only.split(",")}
    with ExitStack() as stack:
        servers = {}
        for name in done:
            (logs / name).mkdir()
            servers[name] = stack.enter_context(contestants.tailserve(logs / name, *args.flags, *pools[name]))
        for number in range(args.rounds):
            for name, server in servers.items():
                done[name].append(asyncio.run(measure(server, args, number)))
            rows = [report(name, rounds[-1:]) for name, rounds in done.items()]
            print(f"round {number + 1}\n{table(rows, list(rows[0]))}", flush=True)
    rows = [report(name, rounds) for name, rounds in done.items()]
    print(table(rows, list(rows[0])))
    by_name = {str(row["pool"]): row for row in rows}
    if {"small", "two tiers"} <= by_name.keys():
        for key in ("TTFT_p50_ms", "TTFT_p99_ms"):
            ratio = float(str(by_name["small"][key])) / float(str(by_name["two tiers"][key]))
            print(f"{key}: {ratio:.2f} times lower with the second tier")
    if {"large", "two tiers"} <= by_name.keys():
        moved, still = (
            [summarize(one.critical, 1.0)["TPOT_p99_ms"] for one in done[name]] for name in ("two tiers", "large")
        )
        ratios = [ours / theirs for ours, theirs in zip(moved, still, strict=True)]
        print(f"critical TPOT p99 while blocks move / with room for all: median {statistics.median(ratios):.3f} of {ratios}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
