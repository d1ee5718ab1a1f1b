"""API tiers: which keys belong to whom, and what these tenants may ask for."""

from __future__ import annotations

import hashlib
import secrets

from pydantic import BaseModel, ConfigDict, Field, field_validator

KEY_PREFIX = "sk-"


class TenantConfig(BaseModel):
    """One tenant. Its keys are kept as SHA-256 hashes; `tailserve key` makes a key and its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    api_key_hashes: tuple[str, ...] = Field(min_length=1, description="of its keys, as `tailserve key` prints them")
    classes: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="SLO classes it may use; where a request names none it gets the deployment's default if that is among "
        "them, else the first. Default: all",
    )
    requests_per_minute: float | None = Field(default=None, gt=0, description="default: no limit")
    max_concurrent_requests: int | None = Field(default=None, ge=1, description="default: no limit")

    @field_validator("api_key_hashes")
    @classmethod
    def _check_hashes(cls, hashes: tuple[str, ...]) -> tuple[str, ...]:
        for text in hashes:
            if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
                raise ValueError("give the SHA-256 of a key as 64 hexadecimal digits: `tailserve key` prints one")
        return hashes


def hash_key(key: str) -> str:
    """What a configuration holds instead of a key. Keys are random and long, so that one round suffices."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A random API key of 256 bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)
