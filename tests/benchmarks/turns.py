"""What a later turn's first token costs, against the same conversation sent for the first time.

Run: python tests/benchmarks/turns.py [--users 1] [--chats 12] [--turns 8] [--answer 128] [--json FILE]

Each chat has a session of its own and at most 60 new tokens a turn; behind it its last turn is sent again with no session
("cold"), the words of each message in another order. The ideal hit rate has every full block of what was said before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import uuid
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import contestants
from contestants import Contestant
from sessions import WORDS

from tailserve.cluster.settings import prepare_serve
from tailserve.deployments.bench.load import Client, Sample
from tailserve.deployments.bench.report import table

BLOCK = 16
WORDS_A_TURN = 40
"""Of a question: no more than 60 tokens."""
ANY_NUMBER = nullcontext()
"""Of requests in flight."""


async def send(client: Client, messages: list[dict[str, str]], answer: int, session_id: str | None) -> Sample:
    body = {"messages": messages, "max_tokens": answer, "ignore_eos": True, "temperature": 0}
    headers = {} if session_id is None else {"X-Session-ID": session_id}
    sample = await client.stream(body, path="chat/completions", headers=headers)
    if sample.error:
        raise SystemExit(f"a turn failed: {sample.error}")
    return sample


async def hold(
    client: Client,
    turns: int,
    answer: int,
    chance: random.Random,
    *,
    first: int = WORDS_A_TURN,
    pause_s: float = 0.0,
    in_flight: AbstractAsyncContextManager[object] = ANY_NUMBER,
) -> list[Sample]:
    """The samples of a chat's turns, in a session of its own. `first`: words of its first message. `pause_s`: before each
    turn, in the mean. `in_flight`: held for as long as a turn takes."""
    samples, _ = await _hold(client, turns, answer, chance, first, pause_s, in_flight)
    return samples


async def chat(client: Client, turns: int, answer: int, chance: random.Random) -> list[Sample]:
    """The samples of a chat's turns, and of its last one sent cold."""
    samples, messages = await _hold(client, turns, answer, chance, WORDS_A_TURN, 0.0, ANY_NUMBER)
    mixed = [message | {"content": " ".join(_mixed(message["content"].split(), chance))} for message in messages[:-1]]
    return [*samples, await send(client, mixed, 2, None)]


async def _hold(
    client: Client,
    turns: int,
    answer: int,
    chance: random.Random,
    first: int,
    pause_s: float,
    in_flight: AbstractAsyncContextManager[object],
) -> tuple[list[Sample], list[dict[str, str]]]:
    messages: list[dict[str, str]] = []
    samples, session_id = [], uuid.uuid4().hex
    for turn in range(turns):
        words = chance.choices(WORDS, k=WORDS_A_TURN if turn else first)
        messages.append({"role": "user", "content": " ".join(words)})
        if pause_s:
            await asyncio.sleep(chance.expovariate(1 / pause_s))
        async with in_flight:
            samples.append(await send(client, messages, answer, session_id))
        messages = [*messages, {"role": "assistant", "content": samples[-1].text}]
    return samples, messages


def _mixed(words: list[str], chance: random.Random) -> list[str]:
    return chance.sample(words, len(words))


async def measure(contestant: Contestant, args: argparse.Namespace) -> list[list[Sample]]:
    done: list[list[Sample]] = []
    left = iter(range(args.chats))

    async def user() -> None:
        for number in left:
            samples = await chat(client, args.turns, args.answer, random.Random(number))
            done.append(samples)

    with contestant.awake() as url:
        async with Client(url) as client:
            await chat(client, 2, 16, random.Random(-1))
            await asyncio.gather(*(user() for _ in range(args.users)))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--chats", type=int, default=12)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--flags", nargs="*", default=["--speculation", "off", "--max-model-len", "4096"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="turns-"))
    print(f"logs: {logs}; RAY_SERVE_*: {prepare_serve()}")
    with contestants.tailserve(logs, *args.flags) as ours:
        chats = asyncio.run(measure(ours, args))
    rows = []
    for turn in range(args.turns + 1):
        samples = [one[turn] for one in chats]
        ttft = sorted(1e3 * sample.ttft for sample in samples)
        rows.append(
            {
                "turn": "cold" if turn == args.turns else str(turn + 1),
                "prompt_tokens": statistics.median(sample.prompt_tokens for sample in samples),
                "cached_tokens": statistics.median(sample.cached_tokens for sample in samples),
                "TTFT_p50_ms": statistics.median(ttft),
                "TTFT_p99_ms": ttft[min(int(0.99 * len(ttft)), len(ttft) - 1)],
            }
        )
    print(table(rows, list(rows[0])))
    found = sum(sample.cached_tokens for one in chats for sample in one[1:-1])
    ideal = sum(
        (before.prompt_tokens + before.num_tokens - 1) // BLOCK * BLOCK for one in chats for before in one[: args.turns - 1]
    )
    print(f"found {found} of {ideal} tokens: {100 * found / ideal:.1f}% of the ideal")
    for name in ("TTFT_p50_ms", "TTFT_p99_ms"):
        print(f"{name}: turn {args.turns} is {100 * (1 - rows[-2][name] / rows[-1][name]):.1f}% lower than cold")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
