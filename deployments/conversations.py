"""Responses that later ones go on from."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from tailserve.engine.errors import NotFoundError

MAX_BYTES = 256 << 20
"""Of all conversations together, about."""
OVERHEAD_BYTES = 1024
"""Of a stored response, besides its text."""


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation up to it."""

    id: str
    encoded: bytes
    """The response object, as JSON."""
    messages: tuple[dict[str, str], ...]
    """Instructions are not part of it: they hold for one response."""
    session_id: str | None
    """Whose KV blocks the next turn finds."""

    @property
    def num_bytes(self) -> int:
        return OVERHEAD_BYTES + len(self.encoded) + sum(len(message["content"]) for message in self.messages)


class Conversations:
    """Stored responses of all tenants by their ids, in this process. Where they become too many, the tenant that has most
    loses its oldest."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._stored: dict[str, OrderedDict[str, StoredResponse]] = {}
        self._sizes: Counter[str] = Counter()

    def keep(self, tenant: str, stored: StoredResponse) -> None:
        self._stored.setdefault(tenant, OrderedDict())[stored.id] = stored
        self._sizes[tenant] += stored.num_bytes
        while self._sizes.total() > self._max_bytes:
            loser = max(self._sizes, key=self._sizes.__getitem__)
            self._drop(loser, next(iter(self._stored[loser])))

    def get(self, tenant: str, response_id: str, param: str = "response_id") -> StoredResponse:
        """NotFoundError if a tenant has no such response (any more)."""
        stored = self._of(tenant).get(response_id)
        if stored is None:
            raise NotFoundError(
                f"no response {response_id!r} is stored here (any more): send the whole conversation as input", param=param
            )
        return stored

    def drop(self, tenant: str, response_id: str) -> None:
        """Forgets a response; those that went on from it stay. NotFoundError as in `get`."""
        self.get(tenant, response_id)
        self._drop(tenant, response_id)

    def discard(self, tenant: str, response_id: str) -> None:
        """Forgets a response, if there is one."""
        if response_id in self._of(tenant):
            self._drop(tenant, response_id)

    def drop_session(self, tenant: str, session_id: str) -> None:
        """Forgets all responses of a session."""
        stored = self._of(tenant)
        for response_id in [name for name, response in stored.items() if response.session_id == session_id]:
            self._drop(tenant, response_id)

    def _of(self, tenant: str) -> OrderedDict[str, StoredResponse]:
        return self._stored.get(tenant, OrderedDict())

    def _drop(self, tenant: str, response_id: str) -> None:
        self._sizes[tenant] -= self._stored[tenant].pop(response_id).num_bytes
        if not self._stored[tenant]:
            del self._stored[tenant], self._sizes[tenant]
