"""Tests of chance use fixed seeds: they cannot fail by accident, and say what a failure would mean."""

import numpy as np
import pytest
import torch
from fakes import make_request

from tailserve.engine.speculation.sampling import (
    SamplingPoint,
    apply_penalties,
    distribution,
    draw,
    sample,
    token_logprobs,
    uniforms,
)
from tailserve.engine.types import SamplingParams


def params(**fields: object) -> SamplingParams:
    return make_request([1], **({"temperature": 1.0} | fields)).sampling


def points(count: int, **fields: object) -> list[SamplingPoint]:
    return [SamplingPoint(params(seed=seed, **fields), position=5, num_output=0) for seed in range(count)]


def test_noise_is_a_function_of_seed_and_position_and_looks_uniform() -> None:
    seeds, positions = np.divmod(np.arange(40_000), 200)
    noise = uniforms(seeds.tolist(), positions.tolist())
    assert uniforms([7], [3])[0] == noise[7 * 200 + 3]
    assert 0 < noise.min() < noise.max() < 1
    assert len(np.unique(noise)) == len(noise)
    counts, _ = np.histogram(noise, bins=20, range=(0, 1))
    # Chi-square with 19 degrees of freedom: a fair source exceeds 43.8 once in a thousand choices of these inputs.
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8
    grid = noise.reshape(200, 200)
    neighbours = (
        np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1],
        np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1],
    )
    assert max(map(abs, neighbours)) < 0.02, "neighbouring seeds or positions are correlated"


def test_largest_seed() -> None:
    assert 0 < uniforms([2**64 - 1], [2**31])[0] < 1


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    exact = logits.softmax(-1)
    count = 20_000
    tokens = sample(logits.repeat(count, 1), points(count))
    seen = torch.bincount(torch.tensor(tokens), minlength=5) / count
    # Five standard deviations: a correct sampler leaves them for one choice of seeds in 350,000 (five tokens).
    assert ((seen - exact).abs() < 5 * (exact * (1 - exact) / count).sqrt()).all()


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.75}, [0, 1]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.3}, [0, 1]),
        ({"top_k": 3, "min_p": 0.3}, [0, 1]),
    ],
)
def test_truncation_keeps(fields: dict[str, object], kept: list[int]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    # A neighbour with other parameters must not change a row.
    both = distribution(logits.repeat(2, 1), [params(**fields), params(top_k=1, top_p=0.1)])
    assert both[0].nonzero().flatten().tolist() == kept
    full = logits[0].softmax(-1)[kept]
    torch.testing.assert_close(both[0][kept], full / full.sum())
    assert both[1].nonzero().flatten().tolist() == [0]


def test_a_neighbours_top_p_changes_nothing() -> None:
    logits = torch.randn(1, 49152, generator=torch.Generator().manual_seed(0)) * 3
    alone = distribution(logits.clone(), [params()])
    beside = distribution(logits.repeat(2, 1), [params(), params(top_p=0.5)])
    assert torch.equal(alone[0], beside[0])


def test_temperature_scales_before_top_p() -> None:
    logits = torch.tensor([[1.0, 0.9, -5.0]])
    assert distribution(logits, [params(temperature=0.01, top_p=0.9)])[0].count_nonzero() == 1
    assert distribution(logits, [params(temperature=1.0, top_p=0.9)])[0].count_nonzero() == 2


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.75, 0.0]] * 2)
    assert draw(probs, np.array([1e-17, 1 - 1e-17])).tolist() == [1, 2]


def test_penalties() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0, 1.0])
    apply_penalties(logits, params(repetition_penalty=2.0), [0], [1])
    assert logits.tolist() == [1.0, -4.0, 1.0, 1.0, 1.0]
    logits = torch.zeros(4)
    apply_penalties(logits, params(presence_penalty=1.0, frequency_penalty=0.5), [0, 0], [1, 1, 2])
    assert logits.tolist() == [0.0, -2.0, -1.5, 0.0]


def test_min_tokens_hides_stop_tokens() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0]])
    stops = {"temperature": 0.0, "eos_token_ids": (0,), "stop_token_ids": (2,), "min_tokens": 2}
    early = [SamplingPoint(params(**stops), 9, 1)]
    late = [SamplingPoint(params(**stops), 10, 2)]
    assert sample(logits.clone(), early) == [1]
    assert sample(logits.clone(), late) == [0]


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    [entry] = token_logprobs(logits, [0], 2)
    expected = logits[0].log_softmax(-1)
    assert entry.token_id == 0
    assert entry.logprob == pytest.approx(expected[0].item())
    assert [token for token, _ in entry.top] == [2, 1]
