"""A draft of another vocabulary: it may propose what both know, and reads everything else spelt out."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from fakes import make_request, run_to_end
from local import LocalDrafter, Models, prompts
from tiny import TINY, save_model

from tailserve.engine.errors import ConfigError
from tailserve.engine.model.draft import ModelDrafter
from tailserve.engine.model.vocabulary import VocabularyMap, map_vocabularies

VERIFIER = {"a": 0, "b": 1, "Ġthe": 2, "abc": 3, "</s>": 4}
DRAFT = {"</s>": 0, "b": 1, "a": 2, "c": 3, "▁the": 4, "zz": 5}


def spell(token_id: int) -> list[int]:
    return {3: [2, 1, 3]}[token_id]


def test_tokens_of_both_keep_their_text_and_others_are_spelt() -> None:
    mapped = VocabularyMap(VERIFIER, DRAFT, spell)
    assert mapped.to_draft([0, 1, 2, 4]) == [2, 1, 4, 0]
    assert mapped.to_draft([3, 0, 3]) == [2, 1, 3, 2, 2, 1, 3]


def test_what_may_be_drafted_is_what_both_know() -> None:
    mapped = VocabularyMap(VERIFIER, DRAFT, spell)
    assert dict(zip(mapped.own, mapped.names, strict=True)) == {0: 4, 1: 1, 2: 0, 4: 2}
    for own, name in zip(mapped.own, mapped.names, strict=True):
        assert mapped.to_draft([name]) == [own]


class Words:
    """As much of a tokenizer as is used."""

    def __init__(self, vocab: dict[str, int]) -> None:
        self._vocab = vocab

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


def test_one_vocabulary_needs_no_map_and_strangers_are_refused() -> None:
    assert map_vocabularies(Words(VERIFIER), Words(dict(VERIFIER))) is None
    with pytest.raises(ConfigError, match="4 tokens in common"):
        map_vocabularies(Words(VERIFIER), Words(DRAFT))


@pytest.fixture(scope="module")
def models(tiny_llama: str) -> Models:
    return Models(tiny_llama, num_blocks=200, block_size=8)


@pytest.mark.parametrize("outcomes", [0, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_a_draft_that_speaks_otherwise(
    models: Models, outcomes: int, temperature: float, tmp_path: Path
) -> None:
    """The draft numbers its tokens backwards, lacks a third of the verifier's and has others instead."""
    count = TINY["vocab_size"]
    config = transformers.LlamaConfig(**(TINY | {"vocab_size": count + 20}))
    draft = Models(save_model(config, tmp_path, seed=5), num_blocks=200, block_size=8)
    theirs = {f"t{n}": n for n in range(count)}
    own = {f"t{n}": count + 19 - n for n in range(count) if n % 3} | {f"x{n}": n for n in range(20)}
    vocabulary = VocabularyMap(theirs, own, lambda token: [token % 20, (token + 1) % 20])
    drafter = ModelDrafter(draft.paged, max_num_batched_tokens=256, max_model_len=250, vocabulary=vocabulary)
    wanted = [
        make_request(prompt, id=str(n), seed=n, max_tokens=20, temperature=temperature)
        for n, prompt in enumerate(prompts(8, count))
    ]
    plain = models.engine()
    engine = models.engine_with(LocalDrafter(drafter), num_outcomes=outcomes)
    for request in wanted:
        plain.add(request)
        engine.add(request)
    assert run_to_end(engine).tokens == run_to_end(plain).tokens
    assert engine.stats.draft_tokens > 50


def test_a_draft_that_only_numbers_its_tokens_otherwise_always_agrees(models: Models) -> None:
    """The verifier's own weights, told that its tokens are called something else and back."""
    count = TINY["vocab_size"]
    vocabulary = VocabularyMap({f"t{n}": n for n in range(count)}, {f"t{n}": n for n in range(count)}, spell)
    drafter = ModelDrafter(models.paged, max_num_batched_tokens=256, max_model_len=250, vocabulary=vocabulary)
    draft = Models(models.path, num_blocks=200, block_size=8)
    engine = draft.engine_with(LocalDrafter(drafter))
    for n, prompt in enumerate(prompts(4, count)):
        engine.add(make_request(prompt, id=str(n), max_tokens=20))
    run_to_end(engine)
    assert engine.stats.accepted_draft_tokens == engine.stats.draft_tokens > 40
