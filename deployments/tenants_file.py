"""Tenants that change while an ingress runs: keys are given out and taken back without a restart."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tailserve.cluster.config import TailserveConfig
from tailserve.cluster.files import with_tenants_of_file
from tailserve.deployments.auth import Gate
from tailserve.engine.errors import ConfigError

logger = logging.getLogger(__name__)

REREAD_S = 5.0
"""How soon a change of the file counts."""


async def follow_tenants(config: TailserveConfig, gate: Gate) -> None:
    """Gives `gate` what `config.tenants_file` lists, whenever that changes. Runs until it is cancelled.

    While the file cannot be read, or is wrong, the tenants stay as they were, and the log says so.
    """
    assert config.tenants_file is not None
    file = Path(config.tenants_file)
    seen: bytes | None = None
    said = ""
    while True:
        try:
            data = await asyncio.to_thread(_read, file)
            if data != seen:
                gate.admit((await asyncio.to_thread(with_tenants_of_file, config)).tenants)
                seen = data
            said = ""
        except ConfigError as error:
            if error.message != said:
                logger.error("the tenants stay as they were: %s", error.message)
            said = error.message
        await asyncio.sleep(REREAD_S)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read tenants_file {file}: {error}", param="tenants_file") from None
