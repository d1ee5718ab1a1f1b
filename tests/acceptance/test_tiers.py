"""Eight-turn chats on the demo model, with every tier of KV blocks and with sharing off. Slow; run by hand."""

from __future__ import annotations

import pytest
from chats import hold_chats
from local import Models
from transformers import AutoTokenizer

from tailserve.deployments.models import resolve_model

PATH = str(resolve_model(None))
OPENINGS = [
    "You are a patient teacher. Tell me how rain comes about, step by step.",
    "Write a letter to a friend who lives by the sea, and ask about the harbour.",
    "List the planets of the solar system, the nearest first, with a word on each.",
    "What should somebody know who wants to bake bread for the first time?",
]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(PATH, num_blocks=400, max_model_len=512)


def test_eight_turns_say_the_same_with_every_tier_and_without_sharing(models: Models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    openings = [tokenizer(text)["input_ids"] for text in OPENINGS]

    def hold(draft: str | float, **config: object) -> tuple[list[list[int]], int, int]:
        engine = models.engine(draft, max_num_seqs=2, max_num_batched_tokens=256, **config)
        said = hold_chats(engine, openings, turns=8, answer=24, question=20, vocab=len(tokenizer))
        return said, engine.stats.prefix_cache_hits, engine.stats.host_cache_hits

    expected, found, _ = hold("none", enable_prefix_caching=False)
    assert found == 0
    assert min(map(len, expected)) > 350
    for draft in ("none", "ngram", 0.02):
        for num_blocks, num_host_blocks in ((400, 0), (60, 0), (60, 30), (60, 120)):
            said, found, loaded = hold(draft, num_blocks=num_blocks, num_host_blocks=num_host_blocks)
            print(f"draft {draft}, {num_blocks} blocks, {num_host_blocks} on the host: {found} tokens found, {loaded} there")
            assert said == expected
            assert found > 0
            assert loaded > 0 or num_host_blocks < 120
