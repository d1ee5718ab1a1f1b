"""Responses that later ones go on from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from tailserve.engine.errors import NotFoundError

MAX_CHARS = 64 << 20
"""Of all conversations together."""


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation up to it."""

    response: dict[str, Any]
    messages: tuple[dict[str, str], ...]
    """Instructions are not part of it: they hold for one response."""
    session_id: str
    """Whose KV blocks the next turn finds."""

    @property
    def num_chars(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


class Conversations:
    """Stored responses of all tenants by their ids, in this process; the oldest are forgotten first."""

    def __init__(self, max_chars: int = MAX_CHARS) -> None:
        self._max_chars = max_chars
        self._num_chars = 0
        self._stored: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()

    def keep(self, tenant: str, stored: StoredResponse) -> None:
        self._stored[tenant, stored.response["id"]] = stored
        self._num_chars += stored.num_chars
        while self._num_chars > self._max_chars and len(self._stored) > 1:
            _, oldest = self._stored.popitem(last=False)
            self._num_chars -= oldest.num_chars

    def get(self, tenant: str, response_id: str, param: str = "response_id") -> StoredResponse:
        """NotFoundError if a tenant has no such response (any more)."""
        stored = self._stored.get((tenant, response_id))
        if stored is None:
            raise NotFoundError(
                f"no response {response_id!r} is stored here (any more): send the whole conversation as input", param=param
            )
        return stored

    def drop(self, tenant: str, response_id: str) -> StoredResponse:
        """Forgets a response; those that went on from it stay. NotFoundError as in `get`."""
        stored = self.get(tenant, response_id)
        del self._stored[tenant, response_id]
        self._num_chars -= stored.num_chars
        return stored
