"""Verification of drafts whose tokens were drawn by chance, from a distribution that came along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tailserve.engine.speculation.sampling import SamplingPoint, distribution, mask_early_stops, noise_keys, pick
from tailserve.engine.speculation.verify import count_by_block, count_by_token, residual
from tailserve.engine.types import Candidates, SamplingParams

DRAFT_STREAM = 0xD1B54A32D192ED03
ACCEPT_STREAM = 0x8CB92BA72F3D8DD7
"""Mixed into a request's seed: what draws a draft, what accepts it and what replaces it must be independent."""


def round_seed(seed: int, stream: int, first: int) -> int:
    """The seed of one round, whose draft begins at position `first`.

    Block verification has looked at a whole draft and all its chances when it ends before the last of them. What it has
    looked at is no longer random: a later round that reaches the same positions needs numbers of its own.
    """
    return int(noise_keys([seed ^ stream], [first]).view(np.uint64)[0, 0])


def uniforms(seed: int, first: int, count: int) -> list[float]:
    """Numbers between 0 and 1, both excluded, for a draft of `count` tokens from position `first` on."""
    keys = noise_keys([round_seed(seed, ACCEPT_STREAM, first)] * count, range(count))
    bits = keys[:, 0].view(np.uint32) >> np.uint32(8)
    result: list[float] = ((bits + 0.5) * 2.0**-24).tolist()
    return result


def verify_sampled(
    logits: torch.Tensor,
    params: SamplingParams,
    draft: Sequence[int],
    candidates: Sequence[Candidates],
    *,
    position: int,
    num_output: int,
    block: bool,
) -> list[int]:
    """The tokens a step makes of a sampled draft: those that hold, and one of the verifier's own.

    `logits` [k + 1, vocab], float32, after penalties; `candidates`: for each of the k tokens, the distribution it was drawn
    from; `position`: of the first token in its sequence, `num_output` output tokens before it; `block`: block verification,
    else the token rule. The temperature is above 0. Lossless in distribution; unlike with `verify`, the tokens depend on the
    draft.
    """
    points = [SamplingPoint(params, position + n, num_output + n) for n in range(len(draft) + 1)]
    mask_early_stops(logits, points)
    target = distribution(logits, [params] * len(points))
    proposed = torch.zeros_like(target[:-1])
    for place, (ids, probs) in enumerate(candidates):
        proposed[place, ids] = torch.tensor(probs, dtype=torch.float32, device=logits.device)
    chances = uniforms(params.seed, position, len(draft))
    weight = 1.0
    if block:
        accepted, weight = count_by_block(target, proposed, draft, chances)
    else:
        accepted = count_by_token(target, proposed, draft, chances)
    last = target[accepted] if accepted == len(draft) else residual(target[accepted], proposed[accepted], weight)
    keys = noise_keys([params.seed], [position + accepted])
    return [*draft[:accepted], int(pick(last.log().unsqueeze(0), [1.0], keys)[0])]


def draw_candidates(
    logits: torch.Tensor, temperature: float, seed: int, first: int, place: int, num_candidates: int
) -> tuple[int, Candidates]:
    """A draft's draw from float32 logits [n]: an index, and the distribution over at most `num_candidates` indices, the
    likeliest first. It is token `place` of a draft that begins at position `first`."""
    best = logits.topk(min(num_candidates, len(logits)))
    probs = (best.values / temperature).softmax(-1)
    place = int(pick(probs.log().unsqueeze(0), [1.0], noise_keys([round_seed(seed, DRAFT_STREAM, first)], [place]))[0])
    return int(best.indices[place]), (best.indices.tolist(), probs.tolist())
