"""N-grams where they agree with the head, the head otherwise."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import torch

from tailserve.engine.model.eagle_drafter import EagleDrafter
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork, StateMessage, with_others
from tailserve.engine.speculation.ngram import NgramDrafter

KIND = "both"
UNSURE = 0.3
"""A head that believes in its first token less than this gives way to a long match."""
LONG = 0.5
"""Confidence of a match that is long."""


class CombinedDrafter:
    """`DraftModel`. One step of the head decides: if it says what a match says, the match goes on for nothing."""

    def __init__(self, ngrams: NgramDrafter, head: EagleDrafter) -> None:
        self._ngrams = ngrams
        self._head = head

    def take(self, message: StateMessage) -> None:
        """See `DraftModel.take`."""
        self._head.take(message)

    @torch.inference_mode()
    def run(self, work: DraftWork) -> DraftResult:
        """See `DraftModel.run`."""
        begin = time.perf_counter()
        matches = self._ngrams.run(work).drafts
        chains = self._head.begin(work)
        widths = {entry.row: entry.width for entry in work.rows}
        orders: dict[int, list[Draft]] = {}
        for number in chains.keys() | matches.keys():
            guesses = [chain.draft for chain in chains.get(number, [])]
            match = matches.get(number)
            orders[number] = (guesses if match is None else _order(match, guesses))[: widths[number]]
        wanted = {id(draft) for order in orders.values() for draft in order}
        # Drafts of chains grow where they are.
        self._head.go_on([chain for found in chains.values() for chain in found if id(chain.draft) in wanted])
        drafts = {number: with_others(order, widths[number]) for number, order in orders.items()}
        return DraftResult(work.number, drafts, time.perf_counter() - begin)


def _order(match: Draft, guesses: Sequence[Draft]) -> list[Draft]:
    """What to verify first. `match` may have others beside it."""
    alone, others = msgspec.structs.replace(match, others=[]), list(match.others)
    if not guesses:
        return [alone, *others]
    first, *more = guesses
    # Where the head drew by chance, what it drew may not decide whether that is verified.
    likeliest = first.candidates[0][0][0] if first.candidates else first.token_ids[0]
    if likeliest == match.token_ids[0]:
        return [msgspec.structs.replace(alone, kind=KIND), *more, *others]
    if first.confidences[0] < UNSURE and match.confidences[0] >= LONG:
        return [alone, first, *more, *others]
    return [first, alone, *more, *others]
