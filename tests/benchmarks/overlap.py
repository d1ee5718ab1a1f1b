"""What pre-speculation brings: a stand-in draft with a device of its own, working while the verifier works, and after it.

Run: python tests/benchmarks/overlap.py [--acceptance 0.8] [--tokens 300] [--alternations 5] [--json FILE]

The engine is real. The verifier sleeps for each step; the draft's tokens are right with the given chance, and it sleeps for
half a step to draft one branch, longer for more. Batch 1, greedy.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fakes import VOCAB, FakeExecutor, engine_config, expected_answer, make_request, next_token

from tailserve.engine.config import EngineConfig
from tailserve.engine.engine import Engine
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork, Outcome
from tailserve.engine.types import Batch, StepResult

STEP_S = 0.020
NUM_DRAFTS = 4
TOKEN_S = STEP_S / 2 / NUM_DRAFTS
BRANCH_SHARE = 0.05
"""What each further branch adds to a draft token's time."""
RANKS = (0.6, 0.2, 0.1)
"""The chance that what replaces a wrong token is the draft's next choice, the one after that, and so on."""


class SleepingExecutor(FakeExecutor):
    """Steps end when their time is up, whatever the engine does meanwhile."""

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        self._ends = time.perf_counter() + STEP_S

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        left = self._ends - time.perf_counter()
        if timeout_s is not None and timeout_s < left:
            time.sleep(timeout_s)
            return None
        time.sleep(max(left, 0.0))
        return super().poll()


class SleepingDraft:
    """A draft process in a thread: it knows the right answer, and errs at random."""

    incarnation = 0

    def __init__(self, acceptance: float) -> None:
        self._acceptance = acceptance
        self._chance = random.Random(1)
        self._tokens: dict[int, list[int]] = {}
        self._work: queue.Queue[DraftWork] = queue.Queue()
        self._results: queue.Queue[DraftResult] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, work: DraftWork) -> bool:
        self._work.put(work)
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        deadline = time.perf_counter() + timeout_s
        while True:
            try:
                result = self._results.get(timeout=max(deadline - time.perf_counter(), 0.0001))
            except queue.Empty:
                return None
            if result.number == number:
                return result

    def _run(self) -> None:
        while True:
            work = self._work.get()
            begin = time.perf_counter()
            for row in work.rows:
                self._tokens[row.row] = self._tokens.get(row.row, [])[: row.keep] + row.token_ids
            drafts = {}
            outcomes: list[Outcome] = []
            if work.outcomes:
                for outcome in work.outcomes:
                    outcomes += self._branch(self._tokens[outcome.row], outcome.row, outcome.draft, outcome.fan_out)
            else:
                drafts = {row.row: self._draft(self._tokens[row.row]) for row in work.rows}
            branches = max(len(outcomes), 1)
            # Preparing reads what is being verified first.
            steps = NUM_DRAFTS + bool(work.outcomes)
            time.sleep(max(steps * TOKEN_S * (1 + BRANCH_SHARE * (branches - 1)) - (time.perf_counter() - begin), 0.0))
            self._results.put(DraftResult(work.number, drafts, time.perf_counter() - begin, outcomes))

    def _draft(self, tokens: list[int]) -> Draft:
        ids: list[int] = []
        for _ in range(NUM_DRAFTS):
            right = next_token(tokens + ids)
            ids.append(right if self._chance.random() < self._acceptance else self._other(right))
        return Draft(len(tokens), ids, [self._acceptance] * NUM_DRAFTS)

    def _branch(self, tokens: list[int], row: int, draft: list[int], fan_out: list[int]) -> list[Outcome]:
        outcomes = []
        for accepted, count in enumerate(fan_out):
            context = tokens + draft[:accepted]
            right = next_token(context)
            rank = next((n for n, chance in enumerate(RANKS) if self._chance.random() < chance / (1 - sum(RANKS[:n]))), None)
            for n in range(count):
                token = right if n == rank else self._other(right)
                if token not in draft[accepted : accepted + 1]:
                    outcomes.append(Outcome(row, token, self._draft([*context, token])))
        return outcomes

    def _other(self, token: int) -> int:
        return (token + self._chance.randrange(1, VOCAB)) % VOCAB


def measure(config: EngineConfig, acceptance: float, num_tokens: int) -> tuple[float, Engine]:
    """Seconds per token."""
    engine = Engine(config, SleepingExecutor(config), SleepingDraft(acceptance) if acceptance else None)
    prompt = [1, 2, 3]
    engine.add(make_request(prompt, id="r", max_tokens=num_tokens))
    tokens: list[int] = []
    begin = time.perf_counter()
    while engine.has_work:
        for chunk in engine.step():
            tokens += chunk.token_ids
    seconds = time.perf_counter() - begin
    if tokens != expected_answer(prompt, num_tokens):
        raise SystemExit("the answer is not the verifier's")
    return seconds / num_tokens, engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--outcomes", type=int, default=8)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from msgspec.structs import replace

    sizes: dict[str, Any] = {"max_model_len": 2048, "num_blocks": 2048, "draft_timeout_s": 0.1}
    classes = tuple(replace(slo, speculation=NUM_DRAFTS) for slo in engine_config().classes)
    plain = engine_config(classes=classes, **sizes)
    ahead = engine_config(classes=classes, num_outcomes=args.outcomes, **sizes)
    rows = []
    for _ in range(args.alternations):
        without, _ = measure(plain, 0.0, args.tokens // 4)
        ordinary, _ = measure(plain, args.acceptance, args.tokens)
        foreseen, engine = measure(ahead, args.acceptance, args.tokens)
        stats = engine.stats
        hits = stats.foresight_hits / max(stats.foresight_hits + stats.foresight_misses, 1)
        wasted = 1 - stats.foresight_hits / max(stats.foreseen_drafts, 1)
        rows.append(
            {
                "off_ms": 1e3 * without,
                "ordinary_ms": 1e3 * ordinary,
                "pre_ms": 1e3 * foreseen,
                "hit_rate": hits,
                "wasted": wasted,
            }
        )
        print("  ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()), flush=True)
    gain = statistics.median(row["ordinary_ms"] / row["pre_ms"] for row in rows)
    print(f"pre-speculation over ordinary speculation, median of {len(rows)}: {gain:.2f}x per token")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
