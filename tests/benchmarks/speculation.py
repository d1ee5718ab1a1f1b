"""What speculation brings: the same requests with and without it, taking turns at one server.

Run: python tests/benchmarks/speculation.py single [--temperature 0.7] [--alternations 5] [--json FILE]
     python tests/benchmarks/speculation.py batch [--concurrency 32] [--alternations 5] [--json FILE]

`single` asks sixty chat prompts one at a time; each answer is the same with and without, so times are compared in pairs.
`batch` asks them at once. No prompt is found in a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
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

from tailserve.deployments.bench.load import Client, Sample
from tailserve.deployments.bench.report import summarize

MODES = ("off", "auto")
CLASSES = "".join(f"  - {{name: '{mode}', priority: 10, ttft_s: 5, tpot_s: 0.2, speculation: '{mode}'}}\n" for mode in MODES)
CONFIG = f"slo_classes:\n{CLASSES}default_class: 'off'\nurgent_class: 'off'\nservice_tiers: {{}}\nmax_model_len: 4096\n"
LONG = 256
"""Tokens of a long answer."""
T_95_4 = 2.776
"""Student's t for a two-sided interval of 95% over five values."""


async def ask(client: Client, prompt: str, mode: str, *, temperature: float, seed: int, max_tokens: int) -> Sample:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "cache_salt": uuid.uuid4().hex,
    }
    sample = await client.stream(body, path="chat/completions", headers={"X-SLO-Class": mode}, workload=mode)
    if sample.error:
        raise SystemExit(f"a request failed: {sample.error}")
    return sample


async def single(url: str, args: argparse.Namespace) -> dict[str, Any]:
    prompts = CHAT_PROMPTS[: args.prompts]
    samples: dict[str, list[list[Sample]]] = {mode: [[] for _ in prompts] for mode in MODES}
    async with Client(url) as client:
        for prompt in prompts[:4]:
            for mode in MODES:
                await ask(client, prompt, mode, temperature=0, seed=0, max_tokens=64)
        result: dict[str, Any] = {}
        for turn in range(args.alternations):
            for number, prompt in enumerate(prompts):
                for mode in MODES if (turn + number) % 2 == 0 else reversed(MODES):
                    sample = await ask(
                        client, prompt, mode, temperature=args.temperature, seed=number, max_tokens=args.max_tokens
                    )
                    samples[mode][number].append(sample)
            print(f"after turn {turn + 1}:", flush=True)
            result = judge_pairs(samples)
    return result


def judge_pairs(samples: dict[str, list[list[Sample]]]) -> dict[str, Any]:
    seconds = {mode: [[s.pieces[-1] - s.sent for s in runs] for runs in per_prompt] for mode, per_prompt in samples.items()}
    ratios = [
        [off / auto for off, auto in zip(*runs, strict=True)] for runs in zip(seconds["off"], seconds["auto"], strict=True)
    ]
    drafted = [s for runs in samples["auto"] for s in runs]
    same = sum(a[0].text == b[0].text for a, b in zip(samples["off"], samples["auto"], strict=True))
    print(f"answers that are the same with and without: {same} of {len(ratios)}")
    tokens, pieces = sum(s.num_tokens for s in drafted), sum(len(s.pieces) for s in drafted)
    print(f"tokens a step: {tokens / pieces:.2f}; accepted a verify: {tokens / pieces - 1:.2f}")
    per_prompt = [statistics.fmean(values) for values in ratios]
    total = sum(map(sum, seconds["off"])) / sum(map(sum, seconds["auto"]))
    result: dict[str, Any] = {
        "speed_up_mean_of_prompts": statistics.fmean(per_prompt),
        "speed_up_of_total_time": total,
        "accepted_per_verify": tokens / pieces - 1,
        "per_prompt": per_prompt,
    }
    print(f"speed-up: mean over prompts {statistics.fmean(per_prompt):.2f}x, of the total time {total:.2f}x")
    print(f"  slowest and fastest prompt: {min(per_prompt):.2f}x, {max(per_prompt):.2f}x")
    if len(ratios[0]) == 5:
        upper = [statistics.fmean(v) + T_95_4 * statistics.stdev(v) / math.sqrt(5) for v in ratios]
        result["wholly_below_0.95"] = sum(value < 0.95 for value in upper)
        print(f"  prompts whose 95% interval lies wholly below 0.95x: {result['wholly_below_0.95']}")
    long = [n for n, runs in enumerate(samples["off"]) if runs[0].num_tokens >= LONG]
    if long:
        print(f"answers of {LONG} tokens and more ({len(long)} prompts), seconds:")
        for name, pick in (("mean", np.mean), *((f"p{p}", lambda v, p=p: np.percentile(v, p)) for p in (50, 95, 99))):
            off, auto = (float(pick([t for n in long for t in seconds[mode][n]])) for mode in MODES)
            result[f"long_{name}"] = (off, auto)
            print(f"  {name:>4}: {off:.2f} without, {auto:.2f} with: {off / auto:.2f}x")
    return result


async def batch(url: str, args: argparse.Namespace) -> dict[str, Any]:
    async def run(client: Client, mode: str, turn: int) -> dict[str, Any]:
        waiting = iter([(CHAT_PROMPTS[n % len(CHAT_PROMPTS)], n) for n in range(args.requests or 2 * args.concurrency)])
        samples: list[Sample] = []

        async def user() -> None:
            for prompt, number in waiting:
                samples.append(
                    await ask(
                        client,
                        prompt,
                        mode,
                        temperature=args.temperature,
                        seed=100 * turn + number,
                        max_tokens=args.max_tokens,
                    )
                )

        begin = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(args.concurrency)))
        return summarize(samples, time.perf_counter() - begin)

    rows: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    async with Client(url) as client:
        for mode in MODES:
            await run(client, mode, 99)
        for turn in range(args.alternations):
            for mode in MODES if turn % 2 == 0 else reversed(MODES):
                rows[mode].append(await run(client, mode, turn))
                row = rows[mode][-1]
                print(f"  {mode:>4}: {row['tokens_per_s']:.0f} tok/s, TPOT p99 {row['TPOT_p99_ms']:.1f} ms", flush=True)
    result: dict[str, Any] = {"rows": rows}
    for name, field in (("throughput", "tokens_per_s"), ("TPOT p50", "TPOT_p50_ms"), ("TPOT p99", "TPOT_p99_ms")):
        ratios = [on[field] / off[field] for off, on in zip(rows["off"], rows["auto"], strict=True)]
        result[name] = statistics.median(ratios)
        spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name} with speculation over without, median of {len(ratios)}: {result[name]:.3f}x {spread}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("single", "batch"))
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=len(CHAT_PROMPTS))
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--draft-model", default="ngram")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    logs = Path(tempfile.mkdtemp(prefix="speculation-"))
    print(f"logs: {logs}")
    (logs / "config.yaml").write_text(CONFIG)
    flags = ("--config", str(logs / "config.yaml"), "--draft-model", args.draft_model)
    with contestants.tailserve(logs, *flags) as server, server.awake() as url:
        result = asyncio.run({"single": single, "batch": batch}[args.what](url, args))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
