"""Blocks that went to host memory and came back are the blocks they were: on a tiny real model in float32."""

from __future__ import annotations

import pytest
import torch
from chats import hold_chats
from local import Models, prompts
from tiny import TINY, save_model
from transformers import LlamaConfig

from tailserve.engine.model.host import host_blocks
from tailserve.engine.types import BlockMove

pytestmark = pytest.mark.cores

VOCAB = int(str(TINY["vocab_size"]))
OPENINGS = list(prompts(5, VOCAB, longest=24))


def chats(models: Models, **config: object) -> tuple[list[list[int]], int]:
    """What is said, and how many tokens came from the host."""
    engine = models.engine(max_num_seqs=2, **config)
    said = hold_chats(engine, OPENINGS, turns=4, answer=12, question=9, vocab=VOCAB)
    return said, engine.stats.host_cache_hits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With heads as wide as the compiled decoder takes them."""
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return save_model(LlamaConfig(**(TINY | shape)), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    # Only with these does an answer not depend on what else is computed.
    [("compiled", "float32"), ("compiled", "bfloat16"), ("cpu", "float32"), ("reference", "float32")],
)
def test_answers_are_the_same_with_every_tier_and_without(model: str, backend: str, dtype: str) -> None:
    models = Models(model, attention_backend=backend, dtype=dtype, num_blocks=60, max_model_len=128)
    expected, _ = chats(models, enable_prefix_caching=False)
    assert chats(models) == (expected, 0)
    assert chats(models, num_blocks=18)[0] == expected
    found, hits = chats(models, num_blocks=18, num_host_blocks=40)
    assert found == expected
    assert hits > 100
    found, hits = chats(models, num_blocks=18, num_host_blocks=14)
    assert found == expected
    assert hits > 0


def test_moves_are_made_in_their_order() -> None:
    parts = [torch.arange(4, dtype=torch.bfloat16).view(4, 1, 1) + 10 * n for n in range(2)]
    host = host_blocks(parts, 2)
    host.make(
        [
            BlockMove(0, 0, to_host=True),
            BlockMove(1, 1, to_host=True),
            # The first content gives way, before and after the other is back in its block.
            BlockMove(0, 1, to_host=False),
            BlockMove(2, 0, to_host=True),
            BlockMove(3, 0, to_host=False),
        ]
    )
    assert [part.flatten().tolist() for part in parts] == [[1, 1, 2, 2], [11, 11, 12, 12]]
