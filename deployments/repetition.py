"""Whether a growing answer goes round in circles."""

from __future__ import annotations

from collections import deque

LONGEST_CYCLE = 128
"""Tokens of the longest cycle that is noticed."""
LEAST_REPEATED = 24
"""Tokens that have said nothing new, before a cycle counts as one: so many at least; twice its length, up to twice so many;
and all of its length."""
GRAM = 4
"""Tokens of the runs by which is known what was said before."""
WINDOW = 160
"""Tokens of which is asked how much of them was said before."""
NEAR = 0.92
"""Share of them that makes a near-repeat."""


class Repetition:
    """Exact cycles (the last tokens, over and over) and near-repeats (nearly all that was said lately had been said)."""

    def __init__(self) -> None:
        self.cycle = 0
        """Tokens of the cycle that the last token was of; 0 for none."""
        self._tokens: list[int] = []
        self._runs = [0] * (LONGEST_CYCLE + 1)
        """For each length, how many tokens in a row equal the one so far before them."""
        self._seen: dict[tuple[int, ...], int] = {}
        """Runs of `GRAM` tokens, and where each was first complete."""
        self._old: deque[bool] = deque(maxlen=WINDOW)
        self._num_old = 0

    def push(self, token_id: int) -> bool:
        """Takes the next token; whether it goes round in circles."""
        tokens = self._tokens
        tokens.append(token_id)
        place = len(tokens)
        runs, self.cycle = self._runs, 0
        for length in range(1, min(LONGEST_CYCLE, place - 1) + 1):
            if tokens[-1 - length] == token_id:
                runs[length] += 1
                if not self.cycle and runs[length] >= max(min(2 * length, 2 * LEAST_REPEATED), LEAST_REPEATED, length):
                    self.cycle = length
            else:
                runs[length] = 0
        gram = tuple(tokens[-GRAM:])
        first = self._seen.setdefault(gram, place)
        # What overlaps with itself is a cycle's matter.
        old = place - first >= GRAM
        if len(self._old) == WINDOW:
            self._num_old -= self._old[0]
        self._old.append(old)
        self._num_old += old
        return self.cycle > 0 or self._num_old >= NEAR * WINDOW
