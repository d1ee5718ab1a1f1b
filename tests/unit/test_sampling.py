"""Tests of chance use fixed seeds: they cannot fail by accident, and say what a failure would mean."""

import math

import numpy as np
import pytest
import torch
from fakes import make_request

from tailserve.engine.speculation.sampling import (
    SamplingPoint,
    apply_penalties,
    distribution,
    exponentials,
    noise_keys,
    sample,
    token_logprobs,
)
from tailserve.engine.types import SamplingParams


def params(**fields: object) -> SamplingParams:
    return make_request([1], **({"temperature": 1.0} | fields)).sampling


def points(count: int, **fields: object) -> list[SamplingPoint]:
    return [SamplingPoint(params(seed=seed, **fields), position=5, num_output=0) for seed in range(count)]


CPU = torch.device("cpu")


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    noise = exponentials(noise_keys([5, 7, 7], [1, 3, 4]), 1000, CPU)
    assert torch.equal(exponentials(noise_keys([7], [3]), 1000, CPU)[0], noise[1])
    assert torch.equal(exponentials(noise_keys([7], [3]), 600, CPU)[0], noise[1, :600])
    assert len({tuple(row.tolist()) for row in noise}) == 3


def test_noise_looks_exponential_and_neighbours_are_independent() -> None:
    """200 seeds x 50 positions x 200 tokens, two million numbers."""
    seeds, positions = np.divmod(np.arange(10_000), 50)
    noise = exponentials(noise_keys(seeds.tolist(), positions.tolist()), 200, CPU)
    uniform = torch.exp(-noise.double()).numpy()
    assert uniform.min() > 0
    assert uniform.max() < 1
    counts, _ = np.histogram(uniform, bins=100, range=(0, 1))
    # Chi-square with 99 degrees of freedom: a fair source exceeds 161 once in ten thousand choices of these inputs.
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 161
    grid = uniform.reshape(200, 50, 200)
    for axis in range(3):
        for step in (1, 2, 16):
            near = np.take(grid, range(grid.shape[axis] - step), axis).ravel()
            far = np.take(grid, range(step, grid.shape[axis]), axis).ravel()
            # A correlation of independent numbers has deviation 1/1400 here: five of them.
            assert abs(np.corrcoef(near, far)[0, 1]) < 5 / 1300


def test_largest_seed() -> None:
    noise = exponentials(noise_keys([2**64 - 1], [2**31]), 10, CPU)
    assert torch.isfinite(noise).all()
    assert (noise > 0).all()


def test_rounding_hardly_ever_changes_a_draw() -> None:
    """What a different batch shape does to float32 logits, on flat distributions over a large vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 49152, generator=generator) * 2
    rounded = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
    assert sample(logits, points(400)) == sample(rounded, points(400))


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


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2000, 1)
    assert set(sample(logits, points(2000))) == {1, 2}


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


def test_how_likely_the_end_was_is_said_where_asked() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    [entry] = token_logprobs(logits, [0], 0, [1, 3])
    assert entry.end == pytest.approx(math.log(float(logits.softmax(-1)[0, [1, 3]].sum())))
    assert token_logprobs(logits, [0], 0)[0].end is None


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    [entry] = token_logprobs(logits, [0], 2)
    expected = logits[0].log_softmax(-1)
    assert entry.token_id == 0
    assert entry.logprob == pytest.approx(expected[0].item())
    assert [token for token, _ in entry.top] == [2, 1]
