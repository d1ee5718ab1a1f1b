"""What must not depend on anything but the request: its tokens. On a tiny real model in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from exact import check_answers
from fakes import Answers, make_request, run_to_end
from local import Models, prompts
from tiny import TINY

from tailserve.engine.types import Request

PROMPTS = list(prompts(12, TINY["vocab_size"]))
DRAFTS = ["ngram", 0.0, 0.3, 10.0]


@pytest.fixture(scope="module")
def models(tiny_llama: str) -> Models:
    return Models(tiny_llama, num_blocks=200, block_size=8)


def requests(**fields: object) -> list[Request]:
    return [
        make_request(prompt, id=f"p{n}", max_tokens=20 + n, **({"temperature": 1.0, "seed": n, "scope": "all"} | fields))
        for n, prompt in enumerate(PROMPTS)
    ]


def alone(models: Models, wanted: list[Request]) -> dict[str, list[int]]:
    tokens = {}
    for request in wanted:
        engine = models.engine(enable_prefix_caching=False)
        engine.add(request)
        tokens |= run_to_end(engine).tokens
    return tokens


@pytest.fixture(scope="module")
def sampled_alone(models: Models) -> dict[str, list[int]]:
    return alone(models, requests())


def test_greedy_equals_transformers_generate(models: Models) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(models.path, dtype=torch.float32)
    oracle.generation_config.eos_token_id = None  # answers of full length
    tokens = alone(models, requests(temperature=0.0))
    for request in requests():
        prompt = list(request.prompt_token_ids)
        config = transformers.GenerationConfig(max_new_tokens=request.sampling.max_tokens, do_sample=False, pad_token_id=0)
        answer = oracle.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config)
        assert tokens[request.id] == answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("draft", "width"), [("none", 1), *((draft, width) for draft in DRAFTS for width in (1, 4))])
@pytest.mark.parametrize("caching", [True, False])
def test_sampled_tokens_depend_on_the_request_alone(
    models: Models, sampled_alone: dict[str, list[int]], draft: str | float, width: int, caching: bool
) -> None:
    """In a batch or alone, with any draft or none, branches, the prefix cache or neither, in chunks or whole."""
    engine = models.engine(draft, enable_prefix_caching=caching, max_num_batched_tokens=48, draft_branches=width)
    # The second round finds its prompts in the cache, where there is one.
    for _ in range(2):
        hits = engine.stats.prefix_cache_hits
        for request in requests():
            engine.add(request)
        assert run_to_end(engine).tokens == sampled_alone
        engine.check_integrity()
    assert (engine.stats.prefix_cache_hits > hits) == caching
    if draft == 0.0:
        assert engine.stats.accepted_draft_tokens > 0
    if draft == 0.3 and width > 1:
        assert engine.stats.accepted_by_kind["model beside"] > 0


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("draft", DRAFTS)
def test_penalties_see_the_draft(models: Models, draft: str | float, width: int) -> None:
    wanted = requests(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, min_tokens=5, eos_token_ids=(2, 9)
    )
    engine = models.engine(draft, draft_branches=width)
    for request in wanted:
        engine.add(request)
    assert run_to_end(engine).tokens == alone(models, wanted)


def test_a_draft_of_the_same_weights_always_agrees(models: Models) -> None:
    engine = models.engine(0.0)
    for request in requests(temperature=0.0):
        engine.add(request)
    run_to_end(engine)
    assert engine.stats.draft_tokens > 100
    assert engine.stats.accepted_draft_tokens == engine.stats.draft_tokens


def test_preempted_and_resumed_equals_uninterrupted(models: Models, sampled_alone: dict[str, list[int]]) -> None:
    engine = models.engine("ngram", max_num_seqs=4, num_blocks=40, max_model_len=128)
    answers = Answers()
    for n, request in enumerate(requests()):
        engine.add(request)
        engine.add(make_request(PROMPTS[n], slo_class="critical", max_tokens=4))
        for _ in range(3):
            answers.take(engine.step())
    run_to_end(engine, answers)
    assert engine.stats.preemptions > 5
    assert {key: answers.tokens[key] for key in sampled_alone} == sampled_alone
    engine.check_integrity()


def test_logprobs_do_not_depend_on_the_draft(models: Models) -> None:
    collected = []
    for draft, width in (("none", 1), (0.3, 1), (0.3, 4)):
        engine = models.engine(draft, draft_branches=width)
        request = make_request(PROMPTS[0], id="p", max_tokens=12, logprobs=3, temperature=0.7)
        engine.add(request)
        chunks = []
        while engine.has_work:
            chunks += engine.step()
        collected.append([entry for chunk in chunks for entry in chunk.logprobs or ()])
        assert [entry.token_id for entry in collected[-1]] == [token for chunk in chunks for token in chunk.token_ids]
    plain = collected[0]
    assert all(len(entry.top) == 3 for entry in plain)
    for drafted in collected[1:]:
        assert [entry.token_id for entry in drafted] == [entry.token_id for entry in plain]
        assert [entry.logprob for entry in drafted] == pytest.approx([entry.logprob for entry in plain], abs=1e-4)


@pytest.mark.parametrize(("draft", "rule"), [(0.3, "branches"), (0.3, "block"), ("none", "one_hot")])
def test_answers_follow_the_exact_distribution(draft: str | float, rule: str, tmp_path: Path) -> None:
    check_answers(tmp_path, draft, rule, in_flight=8, seeds=1000)
