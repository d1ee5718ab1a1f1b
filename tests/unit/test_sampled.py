"""Drafts drawn by chance: the tokens must follow the verifier's distribution, whatever the draft's is.

Seeds are fixed, so nothing here can fail by accident; thresholds say what a failure would mean.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from fakes import make_request

from tailserve.engine.model.combined_drafter import _order
from tailserve.engine.model.proposals import Proposal, extend
from tailserve.engine.speculation.drafter import Draft, DraftRow
from tailserve.engine.speculation.sampled import draw_candidates, uniforms, verify_sampled
from tailserve.engine.speculation.sampling import distribution, noise_keys, pick
from tailserve.engine.speculation.verify import count_by_block, count_by_token, residual

VOCAB, LENGTH, COUNT = 4, 2, 1500


def draft_and_verify(logits, draft_logits, seed: int, block: bool, temperature: float, top_k: int):  # type: ignore[no-untyped-def]
    """One step on a model whose logits depend on the tokens before: `logits[prefix]`. Three tokens, and how many held.

    What the step does not reach, the model draws itself.
    """
    sampling = make_request([1], temperature=temperature, top_k=top_k, seed=seed).sampling
    draft, candidates = [], []
    for n in range(LENGTH):
        index, drawn = draw_candidates(draft_logits[tuple(draft)], temperature, seed, 10, n, 3)
        draft.append(index)
        candidates.append(drawn)
    rows = torch.stack([logits[tuple(draft[:n])] for n in range(LENGTH + 1)])
    tokens = verify_sampled(rows.clone(), sampling, draft, candidates, position=10, num_output=0, block=block)
    held = len(tokens) - 1
    while len(tokens) < LENGTH + 1:
        row = logits[tuple(tokens)].unsqueeze(0).clone()
        probs = distribution(row, [sampling])
        tokens.append(int(pick(probs.log(), [1.0], noise_keys([seed], [10 + len(tokens)]))[0]))
    return tuple(tokens), held


def model(seed: int) -> dict[tuple[int, ...], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: 1.5 * torch.randn(VOCAB, generator=generator)
        for length in range(LENGTH + 1)
        for prefix in product(range(VOCAB), repeat=length)
    }


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("block", [False, True])
def test_three_tokens_follow_the_exact_distribution(block: bool, top_k: int) -> None:
    """Chi-square over all 64 answers; a correct rule exceeds the threshold for one choice of seeds in 100,000."""
    logits, draft_logits = model(1), model(2)
    temperature, count = 0.8, COUNT
    sampling = make_request([1], temperature=temperature, top_k=top_k).sampling
    seen: dict[tuple[int, ...], int] = {}
    held = 0
    for seed in range(count):
        tokens, accepted = draft_and_verify(logits, draft_logits, seed, block, temperature, top_k)
        seen[tokens] = seen.get(tokens, 0) + 1
        held += accepted
    assert 0 < held < LENGTH * count
    exact = {}
    for answer in product(range(VOCAB), repeat=LENGTH + 1):
        probs = [distribution(logits[answer[:n]].unsqueeze(0).clone(), [sampling])[0, answer[n]] for n in range(LENGTH + 1)]
        exact[answer] = float(torch.stack(probs).prod())
    assert all(exact[answer] > 0 for answer in seen)
    common = {answer: p * count for answer, p in exact.items() if p * count >= 5}
    statistic = sum((seen.get(answer, 0) - mean) ** 2 / mean for answer, mean in common.items())
    freedom = len(common)
    threshold = freedom * (1 - 2 / (9 * freedom) + 4.265 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < threshold


def test_block_verification_accepts_more() -> None:
    """On the same drafts and numbers, by 2% or more here; the token rule's own spread is a third of that."""
    by_token = by_block = 0
    logits, draft_logits = model(1), model(2)
    for seed in range(COUNT):
        by_token += draft_and_verify(logits, draft_logits, seed, False, 1.0, 0)[1]
        by_block += draft_and_verify(logits, draft_logits, seed, True, 1.0, 0)[1]
    assert by_block > 1.02 * by_token


def test_a_draft_from_the_same_distribution_always_holds() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    for draft in product(range(3), repeat=2):
        assert count_by_token(probs, probs, draft, [0.999999, 0.999999]) == 2
        assert count_by_block(probs, probs, draft, [0.999999, 0.999999])[0] == 2


def test_impossible_tokens_never_hold() -> None:
    target = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    proposed = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert count_by_token(target, proposed, [1, 0], [1e-9, 1e-9]) == 0
    assert count_by_block(target, proposed, [1, 0], [1e-9, 1e-9])[0] == 0


def test_what_replaces_a_token_is_what_the_draft_lacked() -> None:
    left = residual(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.7, 0.1]))
    torch.testing.assert_close(left, torch.tensor([1.0, 0.0, 0.0]))
    same = torch.tensor([0.5, 0.5])
    assert torch.equal(residual(same, same), same)


def test_uniform_numbers_are_independent_of_the_noise_and_never_0_or_1() -> None:
    numbers = np.array([uniforms(seed, 0, 50) for seed in range(2000)])
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    # Chi-square with 49 degrees of freedom: exceeded once in ten thousand choices of these inputs.
    assert ((counts - 2000) ** 2 / 2000).sum() < 97
    other = noise_keys([0] * 50, range(50))[:, 0]
    assert abs(np.corrcoef(numbers[0], other)[0, 1]) < 0.6


@pytest.mark.parametrize("block", [False, True])
def test_rounds_that_follow_one_another_are_independent(block: bool) -> None:
    """What ends a draft says something of all its tokens and of all chances; the next round must know nothing of it.

    Chi-square with 7 degrees of freedom: a correct rule exceeds the threshold for one choice of seeds in 100,000.
    """
    target, proposed = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    count, seen = 3000, Counter[tuple[int, ...]]()
    for seed in range(count):
        sampling = make_request([1], temperature=1.0, seed=seed).sampling
        tokens: list[int] = []
        while len(tokens) < 3:
            first = 10 + len(tokens)
            drawn = [draw_candidates(proposed, 1.0, seed, first, place, 2) for place in range(2)]
            draft, candidates = [index for index, _ in drawn], [kept for _, kept in drawn]
            logits = target.repeat(3, 1)
            tokens += verify_sampled(logits, sampling, draft, candidates, position=first, num_output=0, block=block)
        seen[tuple(tokens[:3])] += 1
    mean = count / 8
    assert sum((seen[answer] - mean) ** 2 / mean for answer in product(range(2), repeat=3)) < 35


def test_how_sure_a_draft_is_does_not_say_what_it_drew() -> None:
    """A token that decides whether it is verified would be in the answer less often than it should."""
    logits = torch.tensor([[0.9, 0.1]]).log()
    told = set()
    for seed in range(30):
        proposal = Proposal(DraftRow(0, 0, [1], 1, temperature=1.0, seed=seed), "draft")
        extend([proposal], logits)
        told.add((proposal.token_ids[0], round(proposal.draft.confidences[0], 4)))
    assert told == {(0, 0.9), (1, 0.9)}


@pytest.mark.parametrize("drawn", [0, 1])
@pytest.mark.parametrize("likeliest", [0, 1])
def test_whether_an_n_gram_goes_first_does_not_depend_on_what_a_head_drew(drawn: int, likeliest: int) -> None:
    match = Draft(1, [0, 0], [0.9, 0.9], kind="ngram")
    guess = Draft(1, [drawn], [0.9], [([likeliest, 1 - likeliest], [0.9, 0.1])], kind="head")
    first = _order(match, [guess])[0]
    assert first.token_ids == ([0, 0] if likeliest == 0 else [drawn])
