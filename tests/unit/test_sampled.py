"""Drafts drawn by chance: the tokens must follow the verifier's distribution, whatever the draft's is.

Seeds are fixed, so nothing here can fail by accident; thresholds say what a failure would mean.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from fakes import make_request

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
        index, drawn = draw_candidates(draft_logits[tuple(draft)], temperature, seed, 10 + n, 3)
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
