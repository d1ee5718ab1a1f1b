"""Whose KV blocks a request may share."""

from __future__ import annotations

import msgspec


def sharing_scope(
    *,
    tenant: str = "",
    session_id: str | None = None,
    prompt_cache_key: str | None = None,
    user: str | None = None,
    cache_salt: str | None = None,
) -> str | None:
    """The scope in which a request's KV blocks may be found again, or None when it shares with nobody.

    A scope is a tenant, then its session if given, else its `prompt_cache_key`, else its `user`, else all of the tenant;
    a salt divides it further. Where there are no tenants (no API keys), a request that names nothing shares nothing, so
    that strangers cannot probe each other's prompts by timing.
    """
    owners = (("session", session_id), ("key", prompt_cache_key), ("user", user))
    # An empty name is none: it would be everybody's.
    owner = next(((kind, value) for kind, value in owners if value), None)
    if owner is None and not tenant and cache_salt is None:
        return None
    return msgspec.json.encode((tenant, owner, cache_salt)).decode()


def belongs_to_session(scope: str, tenant: str, session_id: str) -> bool:
    """Whether a scope is that of a tenant's session, whatever its salt."""
    owner: list[object] = msgspec.json.decode(scope)[:2]
    return owner == [tenant, ["session", session_id]]
