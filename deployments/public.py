"""Prefixes that the operator has declared public."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from tailserve.deployments.text import TextModel
from tailserve.engine.errors import InvalidRequestError


class PublicPrefixes:
    """Knows how many of a prompt's first tokens are public."""

    def __init__(self, text: TextModel, prefixes: Sequence[str]) -> None:
        self._known = [ids for prefix in prefixes for ids in _token_ids(text, prefix)]

    def count(self, prompt: Sequence[int]) -> int:
        """Tokens that a prompt has in common with a public prefix."""
        return max((_num_common(ids, prompt) for ids in self._known), default=0)


def _token_ids(text: TextModel, prefix: str) -> list[list[int]]:
    """What every prompt begins with that begins with a prefix: as plain text, and as a system message."""
    plain = [text.encode(prefix + rest, add_special_tokens=True) for rest in ("\na", " 1")]
    found = [plain[0][: _num_common(*plain)]]
    try:
        chats = [
            text.encode(
                text.render_chat([{"role": "system", "content": prefix}, {"role": "user", "content": word}]),
                add_special_tokens=False,
            )
            for word in ("a", "1")
        ]
    except InvalidRequestError:
        # A model without a template, or one that has no system messages.
        return found
    return [*found, chats[0][: _num_common(*chats)]]


def _num_common(some: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, other, strict=False)))
