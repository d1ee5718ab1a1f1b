"""What the engine and a drafter say to each other. The draft is never needed for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from tailserve.engine.options import BRANCH_TOKENS
from tailserve.engine.types import Candidates

BESIDE = " beside"
"""Behind the kind of drafts that are not a row's first: they fare differently."""


class DraftRow(msgspec.Struct, frozen=True, array_like=True):
    """One sequence whose continuation is asked for. The drafter keeps the tokens of rows it knows."""

    row: int
    keep: int
    """Tokens of this row that still hold; the rest of what the drafter has is dropped. 0 for a new row."""
    token_ids: list[int]
    """Tokens behind them."""
    num_tokens: int
    """Draft tokens wanted, at most."""
    temperature: float = 0.0
    """Above 0, tokens are to be drawn by chance."""
    seed: int = 0
    """Of the request."""
    width: int = 1
    """Drafts wanted, at most: above 1, those that begin with other tokens than the likeliest."""
    least: float = 0.0
    """A token that is less likely than this to be reached and accepted is not worth drafting."""
    traceparent: str = ""
    """Of a new row's request."""
    root: bytes = b""
    """Of a new row: rows of the same root may share what was computed of them. Empty: it shares nothing."""


class OutcomeRow(msgspec.Struct, frozen=True, array_like=True):
    """What is being verified of a row, and how many ways to go on from it are to be prepared."""

    row: int
    draft: list[int]
    """The draft tokens behind those of the row's `DraftRow`."""
    fan_out: list[int]
    """For each number of them that may hold, from 0 to all: how many tokens to consider behind those."""


class DraftWork(msgspec.Struct, frozen=True, array_like=True):
    """Sent after each step. Set by the engine."""

    number: int
    """Of this message; its answer has the same."""
    step: int
    """The step whose tokens these are."""
    rows: list[DraftRow]
    leaves: list[int]
    """Rows that ended."""
    states: bool = False
    """Hidden states of this step's tokens were sent, if the draft reads them."""
    outcomes: list[OutcomeRow] = []
    """For all of `rows` or for none: prepare what may follow instead of drafting."""


class Draft(msgspec.Struct, frozen=True, array_like=True):
    """A proposal for what follows the first `base_len` tokens of a row."""

    base_len: int
    token_ids: list[int]
    confidences: list[float] = []
    """How sure the draft is of each token, given those before it, 0 to 1; of one that was drawn by chance, how likely the
    likeliest was. Empty if it cannot say."""
    candidates: list[Candidates] = []
    """For each token, what it was drawn from, the likeliest first; empty if nothing was left to chance."""
    kind: str = ""
    """What proposed it: confidences of different kinds mean different things."""
    others: list[Draft] = []
    """Further proposals for the same place, each with a first token of its own and no longer than BRANCH_TOKENS."""


def with_others(drafts: Sequence[Draft], width: int) -> Draft:
    """The first of drafts for one place, with up to `width` - 1 of the others beside it: those that begin with a token of
    their own, cut to what a branch may have."""
    first, taken = drafts[0], {drafts[0].token_ids[0]}
    others = []
    for draft in drafts[1:]:
        if draft.token_ids[0] not in taken and len(taken) < width:
            taken.add(draft.token_ids[0])
            tokens, confidences = draft.token_ids[:BRANCH_TOKENS], draft.confidences[:BRANCH_TOKENS]
            kind = draft.kind if draft.kind.endswith(BESIDE) else draft.kind + BESIDE
            others.append(Draft(draft.base_len, tokens, confidences, kind=kind))
    return msgspec.structs.replace(first, others=others) if others else first


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """A draft for what may come."""

    row: int
    token_id: int
    """It applies if this is the last token of the row then, the one before the draft."""
    draft: Draft


class DraftResult(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a `DraftWork` of the same number. Rows without a proposal are absent."""

    number: int
    drafts: dict[int, Draft]
    duration_s: float = 0.0
    outcomes: list[Outcome] = []


class RowStates(msgspec.Struct, frozen=True, array_like=True):
    """Hidden states of one row's tokens, those of verified tokens only."""

    row: int
    start: int
    """Position of the first token."""
    next_tokens: list[int]
    """For each of them, the token behind it."""
    data: bytes
    """bfloat16 [tokens, width], in order."""


class StateMessage(msgspec.Struct, frozen=True, array_like=True):
    """What a step's forward made of its tokens: from the verifier to the draft, past the router."""

    step: int
    rows: list[RowStates]
    leaves: list[int]
    """Rows that ended."""
    fresh: bool = False
    """The verifier's first message: what there was before it is gone."""


class Drafter(Protocol):
    """The engine's side of a draft process. Neither method raises when the draft is dead: there are just no drafts."""

    incarnation: int
    """Changes whenever the other side has forgotten everything."""

    def send(self, work: DraftWork) -> bool:
        """Starts the work. False when there is nobody to do it."""

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        """The answer to the message of this number, or None if it does not come in time."""


class DraftModel(Protocol):
    """The draft process's side: proposes continuations of the rows it keeps."""

    def run(self, work: DraftWork) -> DraftResult: ...

    def take(self, message: StateMessage) -> None:
        """Hidden states, if the draft reads them."""
