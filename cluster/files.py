"""Configuration that is read from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.engine.errors import ConfigError

_UNREADABLE = (OSError, ValueError, yaml.YAMLError)
"""What reading YAML raises: ValueError for bytes that are no text, and for a day that no month has."""


def with_tenants_of_file(config: TailserveConfig) -> TailserveConfig:
    """The configuration with the tenants that `tenants_file` lists among its own. ConfigError names what is wrong there."""
    if config.tenants_file is None:
        return config
    try:
        listed = yaml.safe_load(Path(config.tenants_file).read_text())
    except _UNREADABLE as error:
        raise ConfigError(f"cannot read tenants_file {config.tenants_file}: {error}", param="tenants_file") from None
    if not isinstance(listed, list):
        raise ConfigError(f"tenants_file {config.tenants_file} holds no list: write `- name: ...`", param="tenants_file")
    if not (listed or config.tenants):
        # Without tenants no request would need a key.
        raise ConfigError(f"tenants_file {config.tenants_file} lists nobody: add one, or leave it out", param="tenants_file")
    whole = config.model_dump(mode="json")
    return parse_config(whole | {"tenants": whole["tenants"] + listed, "tenants_file": None})


def read_config_file(path: str) -> dict[str, Any]:
    """A YAML mapping. ConfigError if the file cannot be read or holds something else."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except _UNREADABLE as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}", param="config") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no mapping: write `key: value` lines", param="config")
    return data
