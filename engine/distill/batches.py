"""Examples and their hidden states as padded batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tailserve.engine.distill.corpus import Example
from tailserve.engine.distill.states import StateFile


@dataclass(frozen=True)
class TrainingBatch:
    """B examples, padded to T tokens."""

    token_ids: torch.Tensor
    """[B, T]"""
    features: torch.Tensor
    """[B, T, F * C]"""
    learnt: torch.Tensor
    """[B, T] bool: positions of answers from which there is something to learn."""


def group(examples: Sequence[Example], chosen: Sequence[int], seed: int, tokens: int) -> list[list[int]]:
    """All `chosen` examples once, in random groups of similar length: at most so many tokens each, padding included."""
    chance = random.Random(seed)
    lengths = {n: len(examples[n].token_ids) for n in chosen}
    # Neighbours in length, but not always the same ones.
    order = sorted(chosen, key=lambda n: lengths[n] * chance.uniform(0.9, 1.1))
    groups: list[list[int]] = [[]]
    longest = 0
    for n in order:
        longest = max(longest, lengths[n])
        if groups[-1] and longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            longest = lengths[n]
        groups[-1].append(n)
    chance.shuffle(groups)
    return groups


def read_batch(examples: Sequence[Example], states: StateFile, chosen: Sequence[int]) -> TrainingBatch:
    """The batch of a group."""
    lengths = [len(examples[n].token_ids) for n in chosen]
    shape = (len(chosen), max(lengths))
    ids = torch.zeros(shape, dtype=torch.int64)
    features = torch.zeros(*shape, states.width, dtype=torch.bfloat16)
    learnt = torch.zeros(shape, dtype=torch.bool)
    for row, (n, length) in enumerate(zip(chosen, lengths, strict=True)):
        ids[row, :length] = torch.tensor(examples[n].token_ids)
        features[row, :length] = states.of(n)
        # An answer's first token is always the verifier's own, and nothing follows the last.
        learnt[row, examples[n].prompt_len - 1 : length - 2] = True
    return TrainingBatch(ids, features, learnt)
