"""The environment variables that tailserve itself reads. Everything else is configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    cache_directory: Path
    """TAILSERVE_CACHE, else a folder of the user's cache: converted models."""
    ray_address: str | None
    """RAY_ADDRESS: an existing cluster to deploy on."""


def settings() -> Settings:
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Settings(
        cache_directory=Path(os.environ.get("TAILSERVE_CACHE") or user_cache / "tailserve"),
        ray_address=os.environ.get("RAY_ADDRESS") or None,
    )
