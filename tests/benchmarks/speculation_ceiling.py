"""What speculation could bring at best: a draft that knows the answer and costs nothing, on the demo model in one process.

Run: python tests/benchmarks/speculation_ceiling.py [--tokens 192] [--json FILE]

What is left between the step's own limit and the figures is the machinery.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from chat_prompts import CHAT_PROMPTS
from fakes import engine_config, make_request
from msgspec.structs import replace
from transformers import AutoTokenizer

from tailserve.deployments.bench.report import table
from tailserve.deployments.models import resolve_model
from tailserve.engine.engine import Engine
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.model.profile import profile_steps
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork

NUM_PROMPTS = 8


class Oracle:
    """Proposes the known answer; each token is spoilt with some chance."""

    incarnation = 0

    def __init__(self, answers: list[list[int]], acceptance: float) -> None:
        self._answers = answers
        self._acceptance = acceptance
        self._chance = random.Random(0)
        self._lengths: dict[int, int] = {}

    def send(self, work: DraftWork) -> bool:
        drafts = {}
        for row in work.rows:
            known = row.keep + len(row.token_ids)
            # Rows are numbered in the order of the prompts.
            right = self._answers[row.row][known : known + row.num_tokens]
            tokens = [t if self._chance.random() < self._acceptance else (t + 1) % 1000 for t in right]
            drafts[row.row] = Draft(known, tokens, [self._acceptance] * len(tokens))
        self._result = DraftResult(work.number, drafts)
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult:
        return self._result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = str(resolve_model(None))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = load_model(LoadOptions(path=path, num_blocks=1024, max_model_len=1024, attention_backend="compiled"))
    profile = profile_steps(model)
    print("step profile: " + ", ".join(f"{count}: {1e3 * seconds:.1f} ms" for count, seconds in profile))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        for p in CHAT_PROMPTS[:NUM_PROMPTS]
    ]

    def run(speculation: int | str, oracle: Oracle | None) -> tuple[float, list[list[int]], Engine]:
        """Tokens per second, one prompt after the other."""
        classes = tuple(replace(slo, speculation=speculation) for slo in engine_config().classes)
        config = engine_config(
            classes=classes, max_model_len=1024, num_blocks=info.num_blocks, block_size=info.block_size,
            enable_prefix_caching=False, step_profile=profile, max_num_batched_tokens=512,
        )  # fmt: skip
        engine = Engine(config, LocalExecutor(model), oracle)
        answers, seconds, count = [], 0.0, 0
        for prompt in prompts:
            engine.add(make_request(prompt, max_tokens=args.tokens))
            tokens = list(prompt)
            while not (chunks := engine.step()):
                pass
            tokens += chunks[0].token_ids
            begin = time.perf_counter()
            while engine.has_work:
                for chunk in engine.step():
                    tokens += chunk.token_ids
            seconds += time.perf_counter() - begin
            count += args.tokens - 1
            answers.append(tokens)
        return count / seconds, answers, engine

    plain, answers, _ = run("off", None)
    rows = [{"draft tokens": "off", "acceptance": "", "tokens_per_s": plain, "times": 1.0}]
    for acceptance in (1.0, 0.8, 0.6):
        for speculation in (1, 2, 4, 8, "auto"):
            rate, same, engine = run(speculation, Oracle(answers, acceptance))
            if same != answers:
                print("answers differ: near-ties in bfloat16")
            steps = engine.stats.drafted_steps
            accepted = engine.stats.accepted_draft_tokens / max(steps, 1)
            rows.append(
                {
                    "draft tokens": str(speculation),
                    "acceptance": f"{acceptance}",
                    "tokens_per_s": rate,
                    "times": rate / plain,
                }
                | {"accepted": accepted}
            )
    for row in rows:
        row["times"] = f"{row['times']:.2f}"
        row["accepted"] = f"{row.get('accepted', 0.0):.2f}"
    print(table(rows, ["draft tokens", "acceptance", "accepted", "tokens_per_s", "times"]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
