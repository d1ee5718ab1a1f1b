"""Unit tests start no Ray, and share one tiny random model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

# Read when Triton is imported, by whichever test does so first.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from edge import Edge
from tiny import TINY, save_model


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Models that are loaded while nothing is compiled begin without; most tests are not about that."""
    import torch

    from tailserve.engine.model.compiled import is_cached

    for dtype in (torch.float32, torch.bfloat16):
        if not is_cached(dtype, int8=False):
            name = str(dtype).removeprefix("torch.")
            subprocess.run([sys.executable, "-m", "tailserve.engine.model.compiled", name, "none"], check=True)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig

    return save_model(LlamaConfig(**TINY), tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _no_ray() -> object:
    """A unit test that starts Ray is in the wrong folder."""
    yield
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    """The HTTP edge over a fake model, idle again at the end."""
    edge = Edge(tmp_path)
    await edge.open()
    yield edge
    await edge.settle()
    await edge.close()
