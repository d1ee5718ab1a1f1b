"""What the verifier keeps of each sequence, so that a step's message need not repeat it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tailserve.engine.types import Batch, Candidates, RowJoin, SamplingParams


@dataclass
class Row:
    """Tokens, parameters and block table of one sequence."""

    token_ids: list[int]
    prompt_len: int
    block_ids: array[int]
    """An `array`, which numpy reads without a loop."""
    sampling: SamplingParams


@dataclass(frozen=True)
class RowWork:
    """One row's part of a step."""

    number: int
    row: Row
    start: int
    token_ids: Sequence[int]
    """Known tokens to compute, then draft tokens."""
    draft: Sequence[int]
    branches: Sequence[Sequence[int]]
    """Further drafts."""
    candidates: Sequence[Candidates]
    """What the draft tokens were drawn from, if by chance."""
    samples: bool


class Rows:
    """Rows by number. Follows batches in order."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def apply(self, batch: Batch) -> Iterator[RowWork]:
        """Takes joins, leaves and new blocks in, and yields the batch's entries in order."""
        for number in batch.leaves:
            self._rows.pop(number, None)
        for join in batch.joins:
            self._join(join)
        for number, blocks in batch.new_blocks.items():
            self._rows[number].block_ids.extend(blocks)
        for number, start, length, samples in zip(batch.rows, batch.starts, batch.lengths, batch.samples, strict=True):
            row = self._rows[number]
            draft = batch.drafts.get(number, [])
            token_ids = row.token_ids[start : start + length] + draft
            branches, candidates = batch.branches.get(number, []), batch.candidates.get(number, [])
            yield RowWork(number, row, start, token_ids, draft, branches, candidates, samples)

    def _join(self, join: RowJoin) -> None:
        self._rows[join.row] = Row(list(join.token_ids), join.prompt_len, array("i", join.block_ids), join.sampling)
