"""From a model's name to a directory on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tailserve.cluster.settings import settings
from tailserve.deployments.demo import NAME as DEMO_NAME
from tailserve.deployments.demo import demo_model
from tailserve.engine.errors import ConfigError

_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]


def resolve_model(name: str | None) -> Path:
    """A directory with config, weights and tokenizer; None means the demo model. ConfigError if there is none."""
    if name is None:
        return demo_model(settings().cache_directory)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} has no config.json: give a directory that `save_pretrained` wrote", param="model")
        return path.resolve()
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ConfigError(f"model {name!r} is no local directory, and the hub has it not: {error}", param="model") from error


def model_name(name: str | None) -> str:
    """What clients call a model that has no `served_model_name`."""
    if name is None:
        return DEMO_NAME
    return Path(name).name if Path(name).is_dir() else name
