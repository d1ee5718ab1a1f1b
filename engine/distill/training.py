"""Teaches an EAGLE head the verifier's distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from tailserve.engine.distill.batches import TrainingBatch, group, read_batch
from tailserve.engine.distill.corpus import Example
from tailserve.engine.distill.states import StateFile
from tailserve.engine.distill.unroll import Frozen, precision, teacher_logits, unroll
from tailserve.engine.model.eagle import EagleHead

TOKENS_PER_BATCH = 2560
"""Padding included."""
DEPTH = 3
"""Tokens that the head learns to draft in a row."""
SINGLE = 2 / 3
"""Of all steps, those at the beginning that learn one token only: they take half the time, and it matters most."""
DECAY = 0.8
"""Weight of each further one."""
MATRIX_RATE, OTHER_RATE = 5e-3, 1e-3
"""Learning rates."""
WARM_UP = 0.04
"""Of all steps."""
CHECKPOINT_STEPS = 100


def train(
    head: EagleHead, frozen: Frozen, examples: Sequence[Example], states: StateFile, *, passes: int, folder: Path
) -> None:
    """Trains in place; an interrupted run goes on from its last checkpoint in `folder`.

    Matrices are taught by Muon (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982): where there is little to
    learn from it gets further in each step than AdamW does.
    """
    chosen = [n for n, example in enumerate(examples) if not example.held_out]
    groups = [part for seed in range(passes) for part in group(examples, chosen, seed, TOKENS_PER_BATCH)]
    matrices = [weight for weight in head.parameters() if weight.ndim == 2]
    others = [weight for weight in head.parameters() if weight.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(groups))) for optimizer in optimizers
    ]
    checkpoint = folder / "checkpoint.pt"
    parts: list[Any] = [head, *optimizers, *schedules]
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["step"]
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
    mean = math.nan
    with tqdm(total=len(groups), initial=done, desc="training", unit="step") as bar:
        for step in range(done, len(groups)):
            depth = 1 if step < SINGLE * len(groups) else DEPTH
            loss = _loss(head, frozen, read_batch(examples, states, groups[step]), depth)
            head.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}")
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == len(groups):
                saved = {"step": step + 1, "parts": [part.state_dict() for part in parts]}
                torch.save(saved, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").rename(checkpoint)


def _rate(step: int, steps: int) -> float:
    """A linear warm-up, then a cosine down to a twentieth."""
    return min((step + 1) / (WARM_UP * steps), 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


def _loss(head: EagleHead, frozen: Frozen, batch: TrainingBatch, depth: int) -> torch.Tensor:
    """Cross-entropy per token against the verifier's distribution over the draft's tokens, over `depth` steps in a row."""
    with precision(frozen):
        target = teacher_logits(frozen, batch, frozen.head).float().softmax(-1)
        total = torch.zeros(())
        for step, logits in enumerate(unroll(head, frozen, batch, depth)):
            logprobs = logits.float().log_softmax(-1)
            total = total - DECAY**step * (target * logprobs).sum(-1).mean()
    return total / sum(DECAY**step for step in range(depth))
