"""Responses that later ones go on from."""

from __future__ import annotations

from dataclasses import dataclass

from tailserve.deployments.tenant_store import TenantStore
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
    """Stored responses of all tenants by their ids, in this process."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._stored: TenantStore[StoredResponse] = TenantStore(max_bytes)

    def keep(self, tenant: str, stored: StoredResponse) -> None:
        self._stored.keep(tenant, stored.id, stored)

    def get(self, tenant: str, response_id: str, param: str = "response_id") -> StoredResponse:
        """NotFoundError if a tenant has no such response (any more)."""
        stored = self._stored.find(tenant, response_id)
        if stored is None:
            raise NotFoundError(
                f"no response {response_id!r} is stored here (any more): send the whole conversation as input", param=param
            )
        return stored

    def drop(self, tenant: str, response_id: str) -> None:
        """Forgets a response; those that went on from it stay. NotFoundError as in `get`."""
        self.get(tenant, response_id)
        self.discard(tenant, response_id)

    def discard(self, tenant: str, response_id: str) -> None:
        """Forgets a response, if there is one."""
        self._stored.discard(tenant, response_id)

    def drop_session(self, tenant: str, session_id: str) -> None:
        """Forgets all responses of a session."""
        for response_id, response in self._stored.of(tenant):
            if response.session_id == session_id:
                self.discard(tenant, response_id)
