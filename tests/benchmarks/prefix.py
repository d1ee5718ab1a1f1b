"""What a speculative prefix does for the time to first token: the same prompts in a class with one and in one without.

Run: python tests/benchmarks/prefix.py [--requests 30] [--json FILE]

The draft is a stand-in: an untrained Llama of one small layer in the demo model's vocabulary, so the answers are worthless
and the times are those of a small draft. Each response must say what is the draft's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import contestants
import httpx
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tailserve.deployments.models import resolve_model

LENGTHS = (128, 512)
NUM_PREFIX = 4
CONFIG = f"""\
slo_classes:
  - {{name: prefix, priority: 10, ttft_s: 5, tpot_s: 0.2, speculation: 'off', speculative_prefix: {NUM_PREFIX}}}
  - {{name: plain, priority: 10, ttft_s: 5, tpot_s: 0.2, speculation: 'off'}}
default_class: plain
urgent_class: plain
service_tiers: {{}}
max_model_len: 2048
"""


def make_draft(folder: Path) -> None:
    verifier = resolve_model(None)
    AutoTokenizer.from_pretrained(verifier).save_pretrained(folder)
    vocab = json.loads((Path(verifier) / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], slo: str) -> tuple[float, int, int]:
    """Seconds to the first token, tokens that the events and the usage say are the draft's."""
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    begin, first, marked, declared = time.perf_counter(), 0.0, 0, 0
    async with client.stream("POST", "/v1/completions", json=body, headers={"X-SLO-Class": slo}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event["choices"] and not first:
                    first = time.perf_counter() - begin
                marked += any(choice.get("speculative_prefix") for choice in event["choices"])
                if event.get("usage"):
                    declared = event["usage"]["completion_tokens_details"]["speculative_prefix_tokens"]
    return first, marked, declared


async def measure(url: str, requests: int) -> list[dict[str, Any]]:
    chance, rows = random.Random(0), []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        for length in LENGTHS:
            times: dict[str, list[float]] = {"plain": [], "prefix": []}
            declared = 0
            for number in range(requests + 3):
                prompt = [chance.randrange(1000, 40_000) for _ in range(length)]
                for slo in times if number % 2 else reversed(times):
                    first, marked, tokens = await ask(client, model, prompt, slo)
                    if number >= 3:
                        times[slo].append(first)
                        declared += marked > 0 and tokens == NUM_PREFIX
            for slo, values in times.items():
                p50, p95 = np.percentile(np.array(values) * 1e3, [50, 95])
                rows.append({"prompt": length, "class": slo, "ttft_p50_ms": p50, "ttft_p95_ms": p95})
            ratio = np.median(times["prefix"]) / np.median(times["plain"])
            print(
                f"prompt of {length}: first token with a prefix {ratio:.2f}x of without; {declared} of {requests} declare it"
            )
            for row in rows[-2:]:
                print(f"  {row['class']:>6}: p50 {row['ttft_p50_ms']:.1f} ms, p95 {row['ttft_p95_ms']:.1f} ms")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="prefix-"))
    print(f"logs: {logs}")
    make_draft(logs / "draft")
    (logs / "config.yaml").write_text(CONFIG)
    flags = ("--config", str(logs / "config.yaml"), "--draft-model", str(logs / "draft"))
    with contestants.tailserve(logs, *flags) as server, server.awake() as url:
        rows = asyncio.run(measure(url, args.requests))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
