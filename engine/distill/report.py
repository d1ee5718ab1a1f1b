"""How good a draft is, on prompts that it has not learnt from."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from tailserve.engine.distill.batches import group, read_batch
from tailserve.engine.distill.corpus import Example
from tailserve.engine.distill.states import StateFile
from tailserve.engine.distill.training import TOKENS_PER_BATCH
from tailserve.engine.distill.unroll import Frozen, precision, teacher_logits, unroll
from tailserve.engine.model.eagle import EagleHead


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of tokens, of a draft that goes on from its own guesses."""

    examples: int
    tokens: int
    covered: float
    """Of the verifier's choices, those that are among the draft's tokens at all."""
    greedy: list[float]
    """The draft's n-th token in a row is the verifier's most likely one, if those before it were."""
    sampled: list[float]
    """The verifier's probability, at temperature 1, of the draft's n-th token."""

    @property
    def accepted(self) -> list[float]:
        """Expected accepted tokens of a greedy draft of each length."""
        total, survival, result = 0.0, 1.0, []
        for share in self.greedy:
            survival *= share
            total += survival
            result.append(total)
        return result


@torch.no_grad()
def measure_agreement(
    head: EagleHead, frozen: Frozen, lm_head: torch.Tensor, examples: Sequence[Example], states: StateFile, *, depth: int
) -> Agreement:
    """On the held-out examples. `lm_head` [vocab, C] is the verifier's whole head."""
    chosen = [n for n, example in enumerate(examples) if example.held_out]
    drafted = head.draft_tokens
    hits, alive, likely = torch.zeros(depth), torch.zeros(depth), torch.zeros(depth)
    tokens = covered = 0
    for part in group(examples, chosen, 0, TOKENS_PER_BATCH):
        batch = read_batch(examples, states, part)
        with precision(frozen):
            teacher = teacher_logits(frozen, batch, lm_head).float()
            best, probs = teacher.argmax(-1), teacher.softmax(-1)
            tokens += len(best)
            covered += int(torch.isin(best, drafted).sum())
            ids = batch.token_ids.roll(-2, 1)[batch.learnt]
            place = torch.full(batch.learnt.shape, -1)
            place[batch.learnt] = torch.arange(len(best))
            holds: torch.Tensor | None = None
            for step, logits in enumerate(unroll(head, frozen, batch, depth)):
                guess = drafted[logits.argmax(-1)]
                likely[step] += probs.gather(-1, guess.unsqueeze(-1)).sum()
                right = guess == best
                if holds is None:
                    counts = torch.ones_like(right)
                else:
                    # The step goes on from the one before it at the position before, whose guess is what was read here.
                    before = place.roll(1, 1)[batch.learnt]
                    counts = (before >= 0) & holds[before.clamp(min=0)]
                alive[step] += counts.sum()
                hits[step] += (right & counts).sum()
                # Only where the text itself took the verifier's first choice does the chain go on.
                holds = right & counts & (ids == best)
    return Agreement(
        examples=len(chosen),
        tokens=tokens,
        covered=covered / max(tokens, 1),
        greedy=(hits / alive.clamp(min=1)).tolist(),
        sampled=(likely / max(tokens, 1)).tolist(),
    )
