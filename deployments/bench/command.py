"""The `bench` command: a closed loop at several concurrencies, or an open loop of two classes at several rates."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp

from tailserve.cluster.settings import settings
from tailserve.deployments.bench.load import Client, Sample, Workload, closed_loop, open_loop
from tailserve.deployments.bench.report import attainment, plot_tails, summarize, table
from tailserve.engine.errors import ConfigError

_COLUMNS = ["load", "requests", "failed", "tokens_per_s"] + [
    f"{name}_p{p}_ms" for name in ("TTFT", "TPOT", "ITL") for p in (50, 95, 99)
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("url", help="an OpenAI-compatible server, for example http://127.0.0.1:8000")
    parser.add_argument("--model", help="the model to ask for (default: the first of /v1/models)")
    parser.add_argument(
        "--api-key",
        default=settings().api_key,
        help="where the server asks for one (default: OPENAI_API_KEY)",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="users of the closed loop")
    parser.add_argument("--requests", type=int, default=4, help="requests of each user of the closed loop")
    parser.add_argument("--rate", type=float, nargs="+", help="an open loop instead: requests a second, a quarter critical")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals at each rate")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the closed loop and of normal requests")
    parser.add_argument("--output-tokens", type=int, default=128, help="of the closed loop and of normal requests")
    parser.add_argument("--vocab-size", type=int, default=10_000, help="prompts are random token ids below this")
    parser.add_argument("--ttft-target", type=float, default=0.5, help="seconds to first token, for the share that met both")
    parser.add_argument("--tpot-target", type=float, default=0.08, help="seconds per output token, likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write the distributions of the latencies here, as PNG")


def run(args: argparse.Namespace) -> int:
    """Prints a table; 1 if any request failed. ConfigError if there is no such server."""
    _check(args)
    try:
        groups, rows = asyncio.run(_measure(args))
    except aiohttp.ClientError as error:
        text = f"{args.url} does not answer GET /v1/models ({error}): is it the server's base URL?"
        raise ConfigError(text, param="url") from error
    columns = [*_COLUMNS, *(["met_%"] if args.rate else []), "client_cpu_%"]
    sys.stdout.write(table(rows, columns) + "\n")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot_tails(groups, args.plot)
    return 1 if any(row["failed"] for row in rows) else 0


def _check(args: argparse.Namespace) -> None:
    for name in ("concurrency", "rate"):
        if any(value <= 0 for value in getattr(args, name) or ()):
            raise ConfigError(f"--{name} must be above 0", param=name)
    for name in ("requests", "duration", "prompt_tokens", "output_tokens", "vocab_size"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0", param=name)


async def _measure(args: argparse.Namespace) -> tuple[dict[str, list[Sample]], list[dict[str, Any]]]:
    groups: dict[str, list[Sample]] = {}
    rows: list[dict[str, Any]] = []
    async with Client(args.url, args.model, api_key=args.api_key) as client:
        warmup = Workload("warm-up", args.prompt_tokens, min(args.output_tokens, 8), vocab_size=args.vocab_size)
        await closed_loop(client, warmup, concurrency=2, requests=2, seed=args.seed - 1)
        for load in args.rate or args.concurrency:
            if args.rate:
                work = open_loop(client, _two_classes(args), rate=load, duration_s=args.duration, seed=args.seed)
            else:
                workload = Workload("closed", args.prompt_tokens, args.output_tokens, vocab_size=args.vocab_size)
                work = closed_loop(client, workload, concurrency=load, requests=load * args.requests, seed=args.seed)
            samples, seconds, share = await _timed(work)
            for name in sorted({sample.workload for sample in samples}):
                label = f"{load:g}/s {name}" if args.rate else f"c={load}"
                groups[label] = [sample for sample in samples if sample.workload == name]
                met = attainment(groups[label], ttft_s=args.ttft_target, tpot_s=args.tpot_target)
                figures = summarize(groups[label], seconds)
                rows.append({"load": label} | figures | {"met_%": 100 * met, "client_cpu_%": 100 * share})
    return groups, rows


def _two_classes(args: argparse.Namespace) -> list[Workload]:
    def workload(name: str, prompt: int, output: int, share: float, priority: int) -> Workload:
        # The header is tailserve's; servers with priority scheduling read the field.
        return Workload(
            name,
            prompt,
            output,
            share,
            vocab_size=args.vocab_size,
            headers={"X-SLO-Class": name},
            body={"priority": priority},
        )

    prompt, output = args.prompt_tokens, args.output_tokens
    return [
        workload("critical", max(prompt // 3, 1), max(output // 4, 1), 0.25, -1),
        workload("normal", prompt, output, 0.75, 0),
    ]


async def _timed(work: Coroutine[Any, Any, list[Sample]]) -> tuple[list[Sample], float, float]:
    """Samples, seconds, and the share of a core that this client took."""
    begin, cpu = time.perf_counter(), time.process_time()
    samples = await work
    seconds = time.perf_counter() - begin
    return samples, seconds, (time.process_time() - cpu) / seconds
