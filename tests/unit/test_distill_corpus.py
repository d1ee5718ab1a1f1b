"""What a draft learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import TINY, save_model
from transformers import LlamaConfig

from tailserve.engine.distill import corpus
from tailserve.engine.distill.corpus import Writer
from tailserve.engine.options import LoadOptions


class Letters:
    """A tokenizer of printable characters, one token each."""

    chat_template = "any"
    eos_token_id = 2

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [max(ord(letter) - 32, 0) for letter in text]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(token + 32) for token in ids)

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        return "User: " + turns[0]["content"] + " Bot: "


def test_prompts_are_distinct_and_an_interrupted_run_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "AT_ONCE", 48)
    monkeypatch.setattr(corpus, "MAX_PROMPT", 48)
    model = save_model(LlamaConfig(**(TINY | {"max_position_embeddings": 1024})), tmp_path)
    writer = Writer(LoadOptions(path=model, dtype="float32", attention_backend="reference"), Letters())
    file = tmp_path / "prompts.jsonl"
    prompts = writer.prompts(file, 24)
    assert len(set(prompts)) == 24
    with file.open("ab") as lines:
        lines.write(b'"half a li')
    assert writer.prompts(file, 24) == prompts
