"""What running streams notice of a draft that hangs, or dies, in mid-flight: the gaps between their pieces.

Run: python tests/benchmarks/draft_lost.py [--concurrency 4] [--alternations 5] [--draft-model demo] [--json FILE]

Undisturbed, hung (SIGSTOP, so it is missed, given up and started again) and killed take turns at one server. The bound is
`timeouts.draft_s`: a step waits so long for a draft, once. The draft is started again before the next turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contestants
import numpy as np
from chat_prompts import CHAT_PROMPTS

from tailserve.cluster.config import Timeouts
from tailserve.deployments.bench.load import Client, Sample

SIGNALS = {"undisturbed": None, "hung": signal.SIGSTOP, "killed": signal.SIGKILL}
FIGURES = {"p50": 50, "p99": 99, "longest": 100}
BOUND_MS = 1e3 * Timeouts().draft_s
DRAFTS = "tailserve_spec_decode_num_drafts_total"
METRICS_S = 2.5
"""Behind which a page of metrics is a new one."""
_RESTART_TIMEOUT_S = 120.0


def draft_pid(server: contestants.Contestant) -> int | None:
    """Of the draft's process, by the name that Ray gives it."""
    for pid in server.pids():
        try:
            if b"ray::DraftActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    return None


async def stream(client: Client, number: int, max_tokens: int) -> Sample:
    body = {
        "messages": [{"role": "user", "content": CHAT_PROMPTS[number % len(CHAT_PROMPTS)]}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_salt": uuid.uuid4().hex,
    }
    sample = await client.stream(body, path="chat/completions")
    if sample.error or sample.num_tokens != max_tokens:
        raise SystemExit(f"a stream was lost: {sample.error or f'{sample.num_tokens} of {max_tokens} tokens'}")
    return sample


async def restarted(client: Client, server: contestants.Contestant, old: int) -> None:
    """Returns when another process drafts. A hung one is noticed by the requests that miss it."""
    deadline = time.monotonic() + _RESTART_TIMEOUT_S
    drafts = math.inf
    while draft_pid(server) in (old, None) or server.counter(DRAFTS) <= drafts:
        if time.monotonic() > deadline:
            raise SystemExit("the draft did not come back")
        drafts = server.counter(DRAFTS)
        await stream(client, 0, 64)
        await asyncio.sleep(METRICS_S)


async def turn(client: Client, server: contestants.Contestant, what: str, args: argparse.Namespace) -> list[Sample]:
    pid, number = draft_pid(server), SIGNALS[what]
    if pid is None:
        raise SystemExit("no draft runs: see the log")
    running = [asyncio.create_task(stream(client, n, args.max_tokens)) for n in range(args.concurrency)]
    await asyncio.sleep(args.after_s)
    if any(task.done() for task in running):
        raise SystemExit("the streams ended before the draft was disturbed: raise --max-tokens")
    if number is not None:
        os.kill(pid, number)
    samples = await asyncio.gather(*running)
    if number is not None:
        await restarted(client, server, pid)
    return list(samples)


async def measure(url: str, server: contestants.Contestant, args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {what: [] for what in SIGNALS}
    texts: set[tuple[str, ...]] = set()
    async with Client(url) as client:
        for number in range(3):
            await stream(client, number, 64)
        for number in range(args.alternations):
            for what in SIGNALS if number % 2 == 0 else reversed(SIGNALS):
                samples = await turn(client, server, what, args)
                texts.add(tuple(sample.text for sample in samples))
                gaps = np.array([gap for sample in samples for gap in sample.gaps]) * 1e3
                row = {name: float(np.percentile(gaps, percent)) for name, percent in FIGURES.items()}
                rows[what].append(row)
                print(f"  {what:>11}: " + ", ".join(f"{name} {value:.1f} ms" for name, value in row.items()), flush=True)
    print(f"streams whose text is the same in all turns: {'all' if len(texts) == 1 else 'not all'}")
    medians = {what: {name: statistics.median(row[name] for row in rows[what]) for name in FIGURES} for what in rows}
    for what in ("hung", "killed"):
        growth = medians[what]["p99"] - medians["undisturbed"]["p99"]
        print(f"ITL p99 with the draft {what}: {medians[what]['p99']:.1f} ms, {growth:+.1f} ms (bound: {BOUND_MS:+.0f} ms)")
    return {"rows": rows, "medians": medians, "bound_ms": BOUND_MS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--after-s", type=float, default=2.0, help="when the draft is disturbed")
    parser.add_argument("--draft-model", default="demo")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    logs = Path(tempfile.mkdtemp(prefix="draft-lost-"))
    print(f"logs: {logs}")
    with (
        contestants.tailserve(logs, "--draft-model", args.draft_model, "--speculation", "auto") as server,
        server.awake() as url,
    ):
        result = asyncio.run(measure(url, server, args))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
