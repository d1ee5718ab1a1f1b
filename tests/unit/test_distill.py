"""Teaching a draft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TINY
from transformers import AutoModelForCausalLM

from tailserve.engine.distill import training
from tailserve.engine.distill.corpus import Example
from tailserve.engine.distill.job import borrow, new_head
from tailserve.engine.distill.states import StateFile
from tailserve.engine.distill.training import train
from tailserve.engine.model.eagle import EagleHead

LAYERS = (0, 2)
SIZE, VOCAB = TINY["hidden_size"], TINY["vocab_size"]
PASSES = 6


@pytest.fixture(scope="module")
def verifier(tiny_llama: str):  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).requires_grad_(False)


@pytest.fixture
def examples() -> list[Example]:
    chance = torch.Generator().manual_seed(0)
    rows = torch.randint(5, VOCAB, (6, 24), generator=chance).tolist()
    # None of these prompts is held out.
    return [Example(prompt="a" * (n + 1), token_ids=tuple(row), prompt_len=4, temperature=0.0) for n, row in enumerate(rows)]


def teach(verifier, examples: list[Example], folder: Path) -> tuple[EagleHead, list[float]]:  # type: ignore[no-untyped-def]
    """The head after all passes, and each step's loss."""
    losses: list[float] = []
    folder.mkdir(exist_ok=True)
    features = torch.randn(6 * 24, len(LAYERS) * SIZE, generator=torch.Generator().manual_seed(1))
    (folder / "states.bin").write_bytes(features.bfloat16().view(torch.int16).numpy().tobytes())
    states = StateFile(folder / "states.bin", examples, len(LAYERS) * SIZE)
    torch.manual_seed(2)
    head = new_head(verifier, LAYERS, torch.arange(5, VOCAB))
    frozen, _ = borrow(verifier, head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TOKENS_PER_BATCH", 48)
        patch.setattr(training, "CHECKPOINT_STEPS", 2)
        loss = training._loss
        patch.setattr(training, "_loss", lambda *args: _noted(loss(*args), losses))
        train(head, frozen, examples, states, passes=PASSES, folder=folder)
    return head, losses


def _noted(loss: torch.Tensor, losses: list[float]) -> torch.Tensor:
    losses.append(loss.item())
    return loss


def test_it_learns_and_goes_on_where_it_stopped(  # type: ignore[no-untyped-def]
    verifier, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, losses = teach(verifier, examples, tmp_path / "whole")
    assert len(losses) == 3 * PASSES
    single = int(training.SINGLE * len(losses))
    assert losses[single - 1] < 0.9 * losses[0]
    assert losses[-1] < losses[single]

    part = tmp_path / "part"
    checkpoints = []
    save = torch.save

    def save_thrice(*args: object) -> None:
        save(*args)
        checkpoints.append(args)
        if len(checkpoints) == 3:
            # As if it was stopped before the file had its name.
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_thrice)
    with pytest.raises(KeyboardInterrupt):
        teach(verifier, examples, part)
    monkeypatch.undo()
    again, later = teach(verifier, examples, part)
    assert later == pytest.approx(losses[4:])
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other)
