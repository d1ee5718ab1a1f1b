"""N-grams where they agree with the head, the head otherwise."""

from __future__ import annotations

import time

import msgspec
import torch

from tailserve.engine.model.eagle_drafter import EagleDrafter
from tailserve.engine.speculation.drafter import DraftResult, DraftWork, StateMessage
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
        drafts = self._ngrams.run(work).drafts
        chains = self._head.begin(work.rows)
        for number, draft in list(drafts.items()):
            chain = chains.get(number)
            if chain is None:
                continue
            if chain.token_ids[0] == draft.token_ids[0]:
                drafts[number] = msgspec.structs.replace(draft, kind=KIND)
                del chains[number]
            elif chain.draft.confidences[0] < UNSURE and draft.confidences[0] >= LONG:
                del chains[number]
        return DraftResult(work.number, drafts | self._head.go_on(chains, work.least), time.perf_counter() - begin)
