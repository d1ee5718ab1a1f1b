"""The demo model and its engine in one process, one chat prompt after the other: what a draft brings by itself."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from chat_prompts import CHAT_PROMPTS
from fakes import engine_config, make_request
from local import LocalDrafter as InlineDrafts
from msgspec.structs import replace
from transformers import AutoTokenizer

from tailserve.deployments.models import resolve_model
from tailserve.engine.engine import Engine
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.model.profile import profile_steps
from tailserve.engine.options import LoadOptions, spare_blocks
from tailserve.engine.speculation.drafter import Draft, Drafter, DraftResult, DraftWork, with_others

__all__ = ["InlineDrafts", "KnownAnswers", "LonePrompts", "Run"]


class Run(NamedTuple):
    """What came of all prompts."""

    tokens_per_s: float
    """First tokens aside."""
    answers: list[list[int]]
    """Prompts, and what was generated."""
    engine: Engine

    @property
    def accepted(self) -> float:
        """Draft tokens a verify."""
        stats = self.engine.stats
        return stats.accepted_draft_tokens / max(stats.drafted_steps, 1)


class LonePrompts:
    """The model, loaded once."""

    def __init__(self, count: int, num_tokens: int) -> None:
        self.path = str(resolve_model(None))
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.options = LoadOptions(
            path=self.path,
            num_blocks=1024,
            max_model_len=1024,
            attention_backend="compiled",
            num_spare_blocks=spare_blocks(16),
        )
        self.model, self.info = load_model(self.options)
        self._profile = profile_steps(self.model, self.info.max_model_len)
        single = [step for step in self._profile if not step.unsampled and not step.excess]
        print("step profile: " + ", ".join(f"{step.num_tokens}: {1e3 * step.seconds:.1f} ms" for step in single))
        self._num_tokens = num_tokens
        self._prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            for prompt in CHAT_PROMPTS[:count]
        ]

    def run(self, speculation: int | str, drafter: Drafter | None, *, width: int = 1, **runner: object) -> Run:
        """All prompts, greedily. `runner`: options of `ModelRunner`."""
        config = engine_config(
            classes=tuple(replace(slo, speculation=speculation) for slo in engine_config().classes),
            max_model_len=1024,
            num_blocks=self.info.num_blocks,
            block_size=self.info.block_size,
            enable_prefix_caching=False,
            step_profile=self._profile,
            max_num_batched_tokens=512,
            draft_branches=width,
        )
        engine = Engine(config, LocalExecutor(self.model, num_blocks=self.info.num_blocks, **runner), drafter)
        answers, seconds = [], 0.0
        for prompt in self._prompts:
            engine.add(make_request(prompt, max_tokens=self._num_tokens))
            tokens = list(prompt)
            while not (chunks := engine.step()):
                pass
            tokens += chunks[0].token_ids
            begin = time.perf_counter()
            while engine.has_work:
                for chunk in engine.step():
                    tokens += chunk.token_ids
            seconds += time.perf_counter() - begin
            answers.append(tokens)
        return Run(len(answers) * (self._num_tokens - 1) / seconds, answers, engine)


class KnownAnswers:
    """A drafter that knows the answers and spoils them: the first token of a draft holds with chance `first`, where none
    before it did that of each further one, and what follows a right token with chance `follows`."""

    incarnation = 0

    def __init__(self, answers: list[list[int]], first: float, follows: float) -> None:
        """`answers`: prompts with what follows, in the order in which they are asked: rows are numbered so."""
        self._answers, self._first, self._follows = answers, first, follows
        self._chance = random.Random(0)

    def send(self, work: DraftWork) -> bool:
        self._result = DraftResult(work.number, {})
        for row in work.rows:
            known = row.keep + len(row.token_ids)
            right = self._answers[row.row][known : known + row.num_tokens]
            if right:
                self._result.drafts[row.row] = with_others(self._drafts(known, right, row.width), row.width)
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult:
        return self._result

    def _drafts(self, known: int, right: list[int], width: int) -> list[Draft]:
        drafts, found, share = [], False, self._first
        for n in range(width):
            holds = not found and self._chance.random() < self._first
            found = found or holds
            first = right[0] if holds else (right[0] + n + 1) % 1000
            later = [t if self._chance.random() < self._follows else (t + 1) % 1000 for t in right[1:]]
            drafts.append(Draft(known, [first, *later], [share] + [self._follows] * len(later), kind="stand-in"))
            share *= 1 - self._first
        return drafts
