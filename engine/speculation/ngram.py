"""Drafts by looking the last few tokens up in the sequence itself (prompt lookup decoding)."""

from __future__ import annotations

import time

from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork, StateMessage, with_others

KIND = "ngram"
CONFIDENCES = (0.05, 0.15, 0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85)
"""By the length of the match. A beginning: what holds of them is learnt."""


MOST = 4
"""Continuations that are kept of an n-gram."""


class NgramDrafter:
    """Proposes what followed the most recent earlier occurrence of the sequence's last tokens; beside it, where a row asks
    for branches, what followed others.

    The longest match of `max_ngram` down to `min_ngram` tokens wins. Each row keeps an index from n-gram to the positions
    behind its latest occurrences, so that a proposal costs O(new tokens), not O(context).
    Source: Saxena, "Prompt lookup decoding" (2023).
    """

    def __init__(self, *, min_ngram: int = 2, max_ngram: int = 4) -> None:
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._rows: dict[int, _Row] = {}

    def run(self, work: DraftWork) -> DraftResult:
        """See `DraftModel.run`."""
        begin = time.perf_counter()
        for row in work.leaves:
            self._rows.pop(row, None)
        drafts = {}
        for entry in work.rows:
            state = self._rows.setdefault(entry.row, _Row())
            state.update(entry.keep, entry.token_ids, self._sizes)
            found = state.propose(entry.num_tokens, self._sizes, entry.width)
            if found:
                proposals = [_draft(len(state.tokens), tokens, size) for tokens, size in found]
                drafts[entry.row] = with_others(proposals, entry.width)
        return DraftResult(work.number, drafts, time.perf_counter() - begin)

    def take(self, message: StateMessage) -> None:
        """See `DraftModel.take`; n-grams need none."""


def _draft(base_len: int, tokens: list[int], size: int) -> Draft:
    # Each token that holds makes the match longer.
    confidences = [CONFIDENCES[min(size + n, len(CONFIDENCES) - 1)] for n in range(len(tokens))]
    return Draft(base_len, tokens, confidences, kind=KIND)


class _Row:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.index: dict[tuple[int, ...], tuple[int, ...]] = {}
        """An n-gram to the positions behind it, latest first, one for each token that followed."""

    def update(self, keep: int, token_ids: list[int], sizes: range) -> None:
        if keep < len(self.tokens):
            self.tokens = self.tokens[:keep]
            self.index.clear()
            self._index(0, sizes)
        begin = len(self.tokens)
        self.tokens += token_ids
        self._index(begin, sizes)

    def _index(self, begin: int, sizes: range) -> None:
        # An n-gram is entered once a token follows it, so the sequence's own end is never its own match.
        for follower in range(max(begin, 1), len(self.tokens)):
            for size in sizes:
                if size <= follower:
                    key = tuple(self.tokens[follower - size : follower])
                    others = [place for place in self.index.get(key, ()) if self.tokens[place] != self.tokens[follower]]
                    self.index[key] = (follower, *others[: MOST - 1])

    def propose(self, num_tokens: int, sizes: range, width: int) -> list[tuple[list[int], int]]:
        """Up to `width` continuations that begin differently, and how many tokens matched: longest, then latest, first."""
        found: dict[int, tuple[list[int], int]] = {}
        for size in sizes:
            if size <= len(self.tokens):
                for follower in self.index.get(tuple(self.tokens[-size:]), ()):
                    found.setdefault(self.tokens[follower], (self.tokens[follower : follower + num_tokens], size))
                    if len(found) == width:
                        return list(found.values())
        return list(found.values())
