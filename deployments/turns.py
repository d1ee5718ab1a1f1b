"""Token ids of what was said before, by its text.

A history that is rendered again need not tokenize into the ids that made it, and then its KV would not be found again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

BRANCHES = 4
"""Conversations remembered under one scope: a turn may be taken again from an earlier one."""
MAX_TOKENS = 2_000_000
"""Of all conversations together."""


class Turns:
    """Remembers conversations up to their last answers, the least recently continued one forgotten first."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._known: OrderedDict[str, OrderedDict[str, tuple[int, ...]]] = OrderedDict()
        """Scope to texts and their ids."""

    def find(self, scope: str | None, text: str) -> tuple[str, tuple[int, ...]]:
        """The longest remembered text in this scope that `text` begins with, and its ids; nothing if there is none."""
        known = self._known.get(scope or "", OrderedDict())
        found = max((before for before in known if text.startswith(before)), key=len, default="")
        return found, known[found] if found else ()

    def keep(self, scope: str, text: str, token_ids: Sequence[int]) -> None:
        """Remembers that these ids stand for a conversation's text; what it went on from need not be known any more."""
        known = self._known.setdefault(scope, OrderedDict())
        self._known.move_to_end(scope)
        for before in [before for before in known if text.startswith(before)]:
            self._forget(known, before)
        known[text] = tuple(token_ids)
        self._num_tokens += len(token_ids)
        while len(known) > BRANCHES:
            self._forget(known, next(iter(known)))
        while self._num_tokens > self._max_tokens:
            self.drop(next(iter(self._known)))

    def drop_all(self, scopes: Callable[[str], bool]) -> None:
        """Forgets all scopes for which this holds."""
        for scope in [scope for scope in self._known if scopes(scope)]:
            self.drop(scope)

    def drop(self, scope: str) -> None:
        """Forgets all of a scope."""
        known = self._known.pop(scope, OrderedDict())
        for text in list(known):
            self._forget(known, text)

    def _forget(self, known: OrderedDict[str, tuple[int, ...]], text: str) -> None:
        self._num_tokens -= len(known.pop(text))
