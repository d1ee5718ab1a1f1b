"""An EAGLE head over whole sequences at once, as it will draft: several tokens in a row, going on from its own output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tailserve.engine.distill.batches import TrainingBatch
from tailserve.engine.model.eagle import EagleHead


@dataclass(frozen=True)
class Frozen:
    """What the head borrows from the verifier. Tensors in the training's type."""

    embedding: torch.Tensor
    """[vocab, C]"""
    head: torch.Tensor
    """[draft vocab, C]"""
    final_norm: nn.Module


def precision(frozen: Frozen) -> torch.autocast:
    """What to compute in: bfloat16 where the verifier's part is, float32 otherwise."""
    embedding = frozen.embedding
    return torch.autocast(embedding.device.type, torch.bfloat16, enabled=embedding.dtype == torch.bfloat16)


def unroll(head: EagleHead, frozen: Frozen, batch: TrainingBatch, depth: int) -> Iterator[torch.Tensor]:
    """For each draft step in a row, logits [N, draft vocab] at the N positions that are `learnt`.

    The s-th step at position t goes on from the (s-1)-th at t - 1, and sees keys and values as a draft does that has read
    true states up to t - s and its own from there (the "training-time test" of EAGLE-3).
    """
    count = batch.token_ids.shape[1]
    positions = torch.arange(count)
    embeddings = nn.functional.embedding(batch.token_ids.roll(-1, 1), frozen.embedding)
    states = head.states(batch.features)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for _ in range(depth):
        *heads, residual = head.project(embeddings, states, positions)
        query, key, value = (part.transpose(1, 2) for part in heads)
        groups = query.shape[1] // key.shape[1]
        keys.append(key.repeat_interleave(groups, 1))
        values.append(value.repeat_interleave(groups, 1))
        states = head.finish(residual, _attend(query, keys, values).transpose(1, 2).flatten(2))
        yield head.logits(states[batch.learnt], frozen.head)
        states = _later(states.unsqueeze(1), 1).squeeze(1)


def _attend(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """[B, heads, T, head_dim]; the first of `keys` are of true states, the others of one draft step each."""
    step, count = len(keys) - 1, query.shape[2]
    scale = query.shape[-1] ** -0.5
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1 - step)
    # The very first positions see themselves, so that no row is empty.
    hidden[torch.arange(count), (torch.arange(count) - step).clamp(min=0)] = False
    scores = [(query @ keys[0].transpose(2, 3)).float().mul(scale).masked_fill(hidden, -torch.inf)]
    own = [
        (_later(key, step - n), _later(value, step - n)) for n, (key, value) in enumerate(zip(keys, values, strict=True))
    ][1:]
    scores += [(query * key).sum(-1, keepdim=True).float() * scale for key, _ in own]
    weights = torch.cat(scores, -1).softmax(-1).to(query.dtype)
    out = weights[..., :count] @ values[0]
    for n, (_, value) in enumerate(own):
        out = out + weights[..., count + n : count + n + 1] * value
    return out


def _later(x: torch.Tensor, by: int) -> torch.Tensor:
    """[B, heads, T, size] moved `by` positions on."""
    return nn.functional.pad(x, (0, 0, by, 0))[:, :, : x.shape[2]] if by else x


@torch.no_grad()
def teacher_logits(frozen: Frozen, batch: TrainingBatch, weight: torch.Tensor) -> torch.Tensor:
    """[N, rows of `weight`]: what the verifier says where the head guesses, by these rows of its head."""
    following = batch.features.roll(-1, 1)[batch.learnt][:, -weight.shape[1] :]
    return nn.functional.linear(frozen.final_norm(following.to(weight.dtype)), weight)
