"""How drafts that compute logits choose their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tailserve.engine.speculation.drafter import Draft, DraftRow
from tailserve.engine.speculation.sampled import draw_candidates

NUM_CANDIDATES = 32
"""Tokens that a draft draws from, at most."""


class Proposal:
    """A draft in the making, for a row that asks for one."""

    def __init__(self, row: DraftRow, kind: str, *, base_len: int | None = None) -> None:
        """`base_len`: tokens before it, if not those of the row."""
        self.row = row
        self.columns: list[int] = []
        """Where in the logits its tokens were."""
        self.limit = row.num_tokens
        """Tokens, at most."""
        self.survival = 1.0
        """Chance that all its tokens hold, by its own word."""
        known = row.keep + len(row.token_ids)
        self.draft = Draft(known if base_len is None else base_len, [], [], [], kind)

    @property
    def token_ids(self) -> list[int]:
        return self.draft.token_ids

    def goes_on(self) -> bool:
        """Whether a further token is wanted and likely enough to be reached."""
        return len(self.token_ids) < self.limit and self.survival >= self.row.least

    def add(self, token_id: int, confidence: float, column: int) -> None:
        self.token_ids.append(token_id)
        self.columns.append(column)
        self.draft.confidences.append(confidence)
        self.survival *= confidence


def extend(proposals: Sequence[Proposal], logits: torch.Tensor, names: Sequence[int] | None = None) -> None:
    """Adds a token to each, by float32 logits [proposals, n]: the most likely, or one drawn at the row's temperature.

    `names`: the token ids that the columns stand for; None if they are these themselves.
    """
    best = logits.max(-1)
    confidences = (best.values - logits.logsumexp(-1)).exp().tolist()
    for place, (proposal, index, confidence) in enumerate(zip(proposals, best.indices.tolist(), confidences, strict=True)):
        row, draft = proposal.row, proposal.draft
        if row.temperature > 0:
            first, number = draft.base_len, len(draft.token_ids)
            index, (ids, probs) = draw_candidates(logits[place], row.temperature, row.seed, first, number, NUM_CANDIDATES)
            # Of what was drawn from, not of what was drawn: a token may not decide whether it is verified.
            confidence = probs[0]
            draft.candidates.append((ids if names is None else [names[n] for n in ids], probs))
        proposal.add(index if names is None else names[index], confidence, index)


def runners_up(logits: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The next most likely columns behind the most likely one of [n], and how likely each is."""
    best = logits.topk(min(count + 1, len(logits)))
    shares = (best.values - logits.logsumexp(-1)).exp()
    return list(zip(best.indices.tolist(), shares.tolist(), strict=True))[1:]
