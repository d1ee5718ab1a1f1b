"""The lossless token rule for one-hot drafts."""

from __future__ import annotations

from collections.abc import Sequence


def verify(draft: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """The tokens a step makes of a draft.

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
