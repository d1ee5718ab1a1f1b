"""A draft model's own KV follows the sessions: on a tiny real model."""

from __future__ import annotations

import pytest
from local import Models
from tiny import TINY

from tailserve.engine.model.draft import ModelDrafter
from tailserve.engine.model.spans import Span
from tailserve.engine.speculation.drafter import DraftRow, DraftWork

PROMPT = [(7 * n) % (int(str(TINY["vocab_size"])) - 3) + 3 for n in range(50)]


class Counting:
    """A draft model, and how many tokens it computed before its first draft."""

    def __init__(self, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drafter = ModelDrafter(models.paged, max_num_batched_tokens=256, max_model_len=200)
        self._forward = models.paged.forward
        self._read: list[int] = []
        self._number = 0
        monkeypatch.setattr(models.paged, "forward", self._count)

    def _count(self, spans: list[Span]) -> object:
        self._read.append(sum(len(span.token_ids) for span in spans))
        return self._forward(spans)

    def turn(self, tokens: list[int], root: bytes) -> tuple[int, list[int]]:
        """How many tokens a row read before its first draft token, and its draft; the row is gone then."""
        self._number += 1
        self._read.clear()
        work = DraftWork(self._number, 0, [DraftRow(self._number, 0, tokens, 4, root=root)], [])
        draft = self.drafter.run(work).drafts[self._number]
        self.drafter.run(DraftWork(self._number, 0, [], [self._number]))
        return self._read[0], draft.token_ids


@pytest.fixture
def counting(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(Models(tiny_llama, num_blocks=60, block_size=8, max_model_len=200), monkeypatch)


def test_a_later_turn_reads_only_what_is_new(counting: Counting) -> None:
    turn = [*PROMPT, *PROMPT[:9]]
    read, alone = counting.turn(turn, b"another")
    assert read == 59
    assert counting.turn(PROMPT, b"session")[0] == 50
    read, draft = counting.turn(turn, b"session")
    assert read == 59 - 48
    assert draft == alone


def test_rows_of_no_root_share_nothing(counting: Counting) -> None:
    counting.turn(PROMPT, b"")
    assert counting.turn(PROMPT, b"")[0] == 50
