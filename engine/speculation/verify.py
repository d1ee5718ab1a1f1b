"""What a step makes of a draft, losslessly."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def verify(draft: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """The tokens a step makes of a draft whose tokens were not drawn by chance.

    `sampled[i]` is drawn from the verifier's distribution behind the first `i` draft tokens, with the noise of its own
    position (`len(sampled) == len(draft) + 1`). Draft tokens hold while they equal what was drawn; the first that does not
    is replaced by it, and if all hold the last draw is a bonus.

    A one-hot draft x is thereby accepted with probability p(x), as the token rule of Leviathan et al. (arXiv 2211.17192)
    accepts it, and the tokens are those of a run without a draft, because the noise does not depend on the draft.
    """
    accepted = 0
    while accepted < len(draft) and draft[accepted] == sampled[accepted]:
        accepted += 1
    return list(sampled[: accepted + 1])


def count_by_token(target: torch.Tensor, proposed: torch.Tensor, draft: Sequence[int], uniforms: Sequence[float]) -> int:
    """How many tokens of a sampled draft hold, by the token rule of Leviathan et al. (arXiv 2211.17192).

    `target` and `proposed` [k, vocab], float32: the verifier's distribution where each of the k draft tokens stands, and
    exactly that which the token was drawn from. Token i holds while uniforms[i] < p(x) / q(x).
    """
    places = torch.arange(len(draft)), torch.tensor(draft)
    pairs = zip(target[places].tolist(), proposed[places].tolist(), uniforms, strict=True)
    return next((place for place, (p, q, uniform) in enumerate(pairs) if uniform * q >= p), len(draft))


def count_by_block(
    target: torch.Tensor, proposed: torch.Tensor, draft: Sequence[int], uniforms: Sequence[float]
) -> tuple[int, float]:
    """The same by block verification (Sun et al., arXiv 2403.10444), which never accepts fewer on average.

    Also returns P of what holds: the factor that `residual` needs.
    """
    weight, accepted, kept = 1.0, 0, 1.0
    for place, (token, uniform) in enumerate(zip(draft, uniforms, strict=True)):
        p, q = target[place, token].item(), proposed[place, token].item()
        weight = min(1.0, weight * p / q)
        if place + 1 < len(draft):
            left = (weight * target[place + 1] - proposed[place + 1]).clamp(min=0).sum().item()
            # Nothing is left over and nothing was lost: the two distributions are one.
            chance = left / (left + 1 - weight) if left + 1 - weight > 0 else 1.0
        else:
            chance = weight
        if uniform <= chance:
            accepted, kept = place + 1, weight
    return accepted, kept


def residual(target: torch.Tensor, proposed: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """What the token behind those that hold is drawn from [vocab]: max(weight p - q, 0), normalised."""
    left = (weight * target - proposed).clamp(min=0)
    total = left.sum()
    # Rounding can leave nothing where p equals q; then the token had been accepted but for that rounding.
    return left / total if total > 0 else target
