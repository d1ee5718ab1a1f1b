"""Chats of several turns, each with its whole history: what a later turn's first token costs, ours and vLLM's in turn.

Run: tests/benchmarks/install_peers vllm, then
     python tests/benchmarks/sessions.py [--users 4] [--turns 8] [--rounds 1] [--json FILE]

Each user has one request in flight; a turn adds about 60 tokens and is answered with 48. Both servers cache prefixes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import uuid
from pathlib import Path
from typing import Any

import contestants
from contestants import Contestant

from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.bench.load import Client, Sample
from tailserve.deployments.bench.report import table

WORDS = ["time", "year", "people", "way", "day", "thing", "woman", "life", "child", "world", "school", "state", "problem"]
ANSWER_TOKENS = 48


async def chat(client: Client, turns: int, chance: random.Random) -> list[Sample]:
    messages: list[dict[str, str]] = []
    samples = []
    headers = {"X-Session-ID": uuid.uuid4().hex}
    for _ in range(turns):
        messages.append({"role": "user", "content": " ".join(chance.choices(WORDS, k=50))})
        body = {"messages": messages, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}
        sample = await client.stream(body, path="chat/completions", headers=headers)
        if sample.error:
            raise SystemExit(f"a turn failed: {sample.error}")
        samples.append(sample)
        messages = [*messages, {"role": "assistant", "content": sample.text}]
    return samples


async def measure(contestant: Contestant, users: int, turns: int, seed: int) -> list[dict[str, Any]]:
    with contestant.awake() as url:
        async with Client(url) as client:
            await chat(client, 2, random.Random(seed + 100))
            chats = await asyncio.gather(*(chat(client, turns, random.Random(seed * 1000 + n)) for n in range(users)))
    rows = []
    for turn in range(turns):
        ttft = [1e3 * one[turn].ttft for one in chats]
        tpot = [1e3 * one[turn].tpot for one in chats]
        figures = {"TTFT_p50_ms": statistics.median(ttft), "TTFT_max_ms": max(ttft), "TPOT_p50_ms": statistics.median(tpot)}
        rows.append({"server": contestant.name, "turn": turn + 1} | figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="sessions-"))
    print(f"logs: {logs}; RAY_SERVE_*: {prepare_serve()}")
    rows = []
    with (
        contestants.tailserve(logs, "--speculation", "off", "--max-model-len", "4096") as ours,
        contestants.vllm(logs, "--max-model-len", "4096") as peer,
    ):
        for number in range(args.rounds):
            for contestant in (ours, peer) if number % 2 == 0 else (peer, ours):
                rows += asyncio.run(measure(contestant, args.users, args.turns, number))
    rows.sort(key=lambda row: (row["turn"], row["server"]))
    print(table(rows, ["server", "turn", "TTFT_p50_ms", "TTFT_max_ms", "TPOT_p50_ms"]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
