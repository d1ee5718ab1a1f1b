"""What the engine and a drafter say to each other. The draft is never needed for an answer."""

from __future__ import annotations

from typing import Protocol

import msgspec


class DraftRow(msgspec.Struct, frozen=True, array_like=True):
    """One sequence whose continuation is asked for. The drafter keeps the tokens of rows it knows."""

    row: int
    keep: int
    """Tokens of this row that still hold; the rest of what the drafter has is dropped. 0 for a new row."""
    token_ids: list[int]
    """Tokens behind them."""


class DraftWork(msgspec.Struct, frozen=True, array_like=True):
    """Sent after each step. Set by the engine."""

    step: int
    num_tokens: int
    """Draft tokens wanted per row, at most."""
    rows: list[DraftRow]
    leaves: list[int]
    """Rows that ended."""


class Draft(msgspec.Struct, frozen=True, array_like=True):
    """A proposal for what follows the first `base_len` tokens of a row."""

    base_len: int
    token_ids: list[int]


class DraftResult(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a `DraftWork` of the same step. Rows without a proposal are absent."""

    step: int
    drafts: dict[int, Draft]


class Drafter(Protocol):
    """The engine's side of a draft process. Neither method raises when the draft is dead: there are just no drafts."""

    incarnation: int
    """Changes whenever the other side has forgotten everything."""

    def send(self, work: DraftWork) -> bool:
        """Starts the work. False when there is nobody to do it."""

    def receive(self, step: int, timeout_s: float) -> DraftResult | None:
        """The answer for `step`, or None if it does not come in time."""


class DraftModel(Protocol):
    """The draft process's side: proposes continuations of the rows it keeps."""

    def run(self, work: DraftWork) -> DraftResult: ...
