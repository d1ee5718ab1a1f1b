"""Who is served from whose KV blocks: an identical prompt from its own session, from another one, and from another tenant.

Run: python tests/benchmarks/isolation.py [--prompts 20] [--words 400]

Prints how many tokens were found and what the first token cost. A stranger's prompt must find none, and its time must not
tell that somebody has asked the same before: it costs what a new one does.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import uuid
from pathlib import Path
from typing import Any

import contestants
import yaml
from contestants import Contestant
from sessions import WORDS

from tailserve.cluster.settings import prepare_serve
from tailserve.cluster.tenants import hash_key, new_key
from tailserve.deployments.bench.load import Client
from tailserve.deployments.bench.report import table

ASKED_BY = ("nobody before", "its own session", "another session", "another tenant", "nobody before, again")


async def measure(contestant: Contestant, keys: dict[str, str], args: argparse.Namespace) -> list[dict[str, Any]]:
    chance = random.Random(7)
    found: dict[str, list[tuple[int, float]]] = {who: [] for who in ASKED_BY}
    with contestant.awake() as url:
        async with Client(url, api_key=keys["a"]) as client:

            async def ask(who: str, prompt: str, tenant: str, session: str) -> None:
                headers = {"Authorization": f"Bearer {keys[tenant]}", "X-Session-ID": session}
                body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
                sample = await client.stream(body, headers=headers)
                if sample.error:
                    raise SystemExit(f"a request failed: {sample.error}")
                found[who].append((sample.cached_tokens, 1e3 * sample.ttft))

            for _ in range(args.prompts):
                prompt, new = (" ".join(chance.choices(WORDS, k=args.words)) for _ in range(2))
                session = uuid.uuid4().hex
                await ask("nobody before", prompt, "a", session)
                await ask("its own session", prompt, "a", session)
                await ask("another session", prompt, "a", uuid.uuid4().hex)
                # It even knows the session's name.
                await ask("another tenant", prompt, "b", session)
                await ask("nobody before, again", new, "b", uuid.uuid4().hex)
    return [
        {
            "asked_by": who,
            "cached_tokens_max": max(cached for cached, _ in samples),
            "TTFT_p50_ms": statistics.median(ttft for _, ttft in samples),
            "TTFT_max_ms": max(ttft for _, ttft in samples),
        }
        for who, samples in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--words", type=int, default=400)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="isolation-"))
    print(f"logs: {logs}; RAY_SERVE_*: {prepare_serve()}")
    keys = {"a": new_key(), "b": new_key()}
    config = {"tenants": [{"name": name, "api_key_hashes": [hash_key(key)]} for name, key in keys.items()]}
    (logs / "config.yaml").write_text(yaml.safe_dump(config | {"speculation": "off"}))
    with contestants.tailserve(logs, "--config", str(logs / "config.yaml")) as ours:
        rows = asyncio.run(measure(ours, keys, args))
    print(table(rows, list(rows[0])))
    strangers = [row for row in rows if row["asked_by"] != "its own session"]
    if any(row["cached_tokens_max"] for row in strangers):
        raise SystemExit("a stranger was served from somebody's blocks")


if __name__ == "__main__":
    main()
