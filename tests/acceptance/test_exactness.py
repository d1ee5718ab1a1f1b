"""The demo model against transformers' own `generate`, over every way a token can be made. Slow; run by hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import pytest
import torch
from fakes import make_request, run_to_end
from local import Models
from oracle import greedy_answers
from prompts import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailserve.deployments.models import resolve_model
from tailserve.engine.model.avx512 import HAS_INT8_DOT
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

NUM_TOKENS = 48
PATH = str(resolve_model(None))


@pytest.fixture(scope="module")
def prompt_ids() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def oracle(prompt_ids: list[list[int]]) -> list[list[int]]:
    return greedy_answers(PATH, prompt_ids, NUM_TOKENS)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(PATH, num_blocks=1200, max_model_len=1024)


def answers(models: Models, ids: list[list[int]], draft: str | float, *, caching: bool, in_flight: int, **sampling: object):  # type: ignore[no-untyped-def]
    engine = models.engine(draft, enable_prefix_caching=caching, max_num_seqs=in_flight, max_num_batched_tokens=256)
    fields = {"max_tokens": NUM_TOKENS, "scope": "all"} | sampling
    runs = []
    # The second round finds its prompts in the cache.
    for _ in range(1 + caching):
        hits = engine.stats.prefix_cache_hits
        for index, prompt in enumerate(ids):
            engine.add(make_request(prompt, id=str(index), **({"seed": index} | fields)))
        runs.append(run_to_end(engine, max_steps=5000).tokens)
        engine.check_integrity()
    assert all(run == runs[0] for run in runs)
    tokens = runs[-1]
    if caching:
        assert engine.stats.prefix_cache_hits > hits
        print(f"{engine.stats.prefix_cache_hits - hits} prompt tokens of the second round came from the cache")
    print(f"draft {draft}: {engine.stats.accepted_draft_tokens} of {engine.stats.draft_tokens} draft tokens accepted")
    return [tokens[str(index)] for index in range(len(ids))]


@pytest.mark.parametrize("in_flight", [1, 16])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("draft", ["none", "ngram", 0.0, 0.02])
def test_greedy_in_float32_equals_generate(
    models: Models, prompt_ids: list[list[int]], oracle: list[list[int]], draft: str | float, caching: bool, in_flight: int
) -> None:
    """Drafts: none, n-grams, the verifier's own weights, and those with 2% noise."""
    assert answers(models, prompt_ids, draft, caching=caching, in_flight=in_flight) == oracle


def test_temperature_1_repeats_itself_with_any_draft_alone_and_in_a_batch(
    models: Models, prompt_ids: list[list[int]]
) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 24}
    alone = answers(models, prompt_ids, "none", caching=False, in_flight=1, **sampling)
    for draft in ("none", "ngram", 0.0, 0.02):
        assert answers(models, prompt_ids, draft, caching=True, in_flight=16, **sampling) == alone


def test_bfloat16_agrees_with_float32_at_least_as_often_as_transformers(
    prompt_ids: list[list[int]], oracle: list[list[int]]
) -> None:
    """Teacher-forced on the float32 answers, ours token by token, within one point."""
    paged, _ = load_model(LoadOptions(path=PATH, dtype="bfloat16", num_blocks=64, max_model_len=1024))
    plain = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.bfloat16)
    ours = theirs = total = 0
    for ids, answer in zip(prompt_ids, oracle, strict=True):
        ours += sum(a == b for a, b in zip(_choices(paged, ids, answer), answer, strict=True))
        theirs += sum(a == b for a, b in zip(_plain_choices(plain, ids, answer), answer, strict=True))
        total += len(answer)
    print(f"of {total} float32 choices: ours {ours / total:.2%}, transformers' own bfloat16 {theirs / total:.2%}")
    assert ours / total >= theirs / total - 0.01


@pytest.mark.skipif(not HAS_INT8_DOT, reason="needs AVX512-VNNI")
def test_int8_agrees_with_float32_in_most_choices(prompt_ids: list[list[int]], oracle: list[list[int]]) -> None:
    """Teacher-forced likewise; what `--quantization int8` costs."""
    paged, _ = load_model(LoadOptions(path=PATH, dtype="bfloat16", quantization="int8", num_blocks=64, max_model_len=1024))
    chosen = [token for ids, answer in zip(prompt_ids, oracle, strict=True) for token in _choices(paged, ids, answer)]
    pairs = list(zip(chosen, chain(*oracle), strict=True))
    agreed = sum(a == b for a, b in pairs) / len(pairs)
    print(f"of {len(pairs)} float32 choices: int8 {agreed:.2%}")
    assert agreed > 0.85


def _choices(paged, ids: list[int], answer: list[int]) -> Iterator[int]:  # type: ignore[no-untyped-def]
    blocks = list(range(64))
    yield int(paged.forward([Span(ids, 0, blocks, 1)]).argmax())
    for index, token in enumerate(islice(answer, len(answer) - 1)):
        yield int(paged.forward([Span([token], len(ids) + index, blocks, 1)]).argmax())


@torch.inference_mode()
def _plain_choices(model, ids: list[int], answer: list[int]) -> list[int]:  # type: ignore[no-untyped-def]
    logits = model(input_ids=torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
    return logits.argmax(-1).tolist()
