"""Lossless, on the demo model and statistically: every kind of draft, every rule. Slow; run by hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from exact import RULES, check_answers
from fakes import engine_config, make_request, run_to_end
from local import LocalDrafter, Models
from oracle import greedy_answers
from transformers import AutoTokenizer

from tailserve.deployments.draft_kinds import DEMO_DRAFT
from tailserve.deployments.models import resolve_model
from tailserve.engine.engine import Engine
from tailserve.engine.model.combined_drafter import CombinedDrafter
from tailserve.engine.model.eagle import load_eagle
from tailserve.engine.model.eagle_loading import load_eagle_drafter
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.ngram import NgramDrafter

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from chat_prompts import CHAT_PROMPTS

PATH = str(resolve_model(None))
HEAD = Path(os.environ.get("TAILSERVE_HEAD") or DEMO_DRAFT)
"""A head for the demo model."""
DRAFTS = ["ngram", "model", "model, foreseen", "eagle", "eagle and ngram"]
NUM_TOKENS = 64
NUM_PROMPTS = 50


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    turns = [[{"role": "user", "content": prompt}] for prompt in CHAT_PROMPTS[:NUM_PROMPTS]]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def oracle(prompts: list[list[int]]) -> list[list[int]]:
    return greedy_answers(PATH, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(PATH, num_blocks=1200, max_model_len=1024)


@pytest.mark.parametrize("in_flight", [1, 8])
@pytest.mark.parametrize(
    ("draft", "width"), [(draft, width) for draft in DRAFTS for width in (1, 4) if width == 1 or "foreseen" not in draft]
)
def test_greedy_in_float32_equals_generate(
    models: Models, prompts: list[list[int]], oracle: list[list[int]], draft: str, width: int, in_flight: int
) -> None:
    sizes = {
        "draft_branches": width,
        "max_num_seqs": in_flight,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": False,
    }
    if draft.startswith("eagle"):
        models.paged.tap(load_eagle(HEAD).config.feature_layers)
        head = load_eagle_drafter(HEAD, LoadOptions(path=PATH, dtype="float32"), num_blocks=1200)
        model = CombinedDrafter(NgramDrafter(), head) if "ngram" in draft else head
        config = engine_config(max_model_len=1024, num_blocks=1200, block_size=16, **sizes)
        executor = LocalExecutor(models.paged, publish=model.take, num_blocks=1200)
        engine = Engine(config, executor, LocalDrafter(model))
    else:
        kind = draft if draft == "ngram" else 0.02
        engine = models.engine(kind, num_outcomes=6 if "foreseen" in draft else 0, **sizes)
    for number, ids in enumerate(prompts):
        engine.add(make_request(ids, id=str(number), max_tokens=NUM_TOKENS))
    answers = run_to_end(engine, max_steps=10_000).tokens
    assert [answers[str(number)] for number in range(len(prompts))] == oracle
    stats = engine.stats
    print(f"{draft}, width {width}: {stats.accepted_draft_tokens} of {stats.draft_tokens} draft tokens accepted, by kind:")
    print(stats.accepted_by_kind)


@pytest.mark.parametrize("in_flight", [1, 8])
@pytest.mark.parametrize("speculation", [3, "auto"])
@pytest.mark.parametrize(("draft", "rule"), RULES)
def test_answers_follow_the_exact_distribution(
    draft: str | float, rule: str, speculation: int | str, in_flight: int, tmp_path: Path
) -> None:
    """See `exact`: a correct sampler fails this for one choice of seeds in 100,000, and the seeds are fixed."""
    check_answers(tmp_path, draft, rule, in_flight=in_flight, seeds=6000, speculation=speculation)
