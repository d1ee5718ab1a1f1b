"""A model changes its engine between two steps, and nobody notices."""

import threading
from pathlib import Path

import pytest
import torch
from packed import run_in_chunks
from tiny import TINY, save_model
from transformers import LlamaConfig

from tailserve.engine.model import compiled, loading, upgrade
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

WIDE = TINY | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(loading, "is_cached", lambda dtype, int8: False)
    return save_model(LlamaConfig(**WIDE), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_what_was_read_before_the_change_is_known_after_it(path: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.fill_cache(getattr(torch, dtype), int8=False)
    compile_now = threading.Event()
    monkeypatch.setattr(upgrade, "compile_elsewhere", lambda *args: compile_now.wait() and compiled.compile_elsewhere(*args))
    model, info = load_model(LoadOptions(path=path, dtype=dtype, num_blocks=64))
    assert isinstance(model, upgrade.UpgradingModel)
    assert info.attention_backend == "cpu"
    tokens = list(range(70))
    begin = model.forward([Span(tokens[:50], 0, [9, 3, 7, 1, 8], 50)])
    assert model.backend == "cpu"
    compile_now.set()
    assert model.wait(300)
    end = model.forward([Span(tokens[50:], 50, [9, 3, 7, 1, 8], 20)])
    assert model.backend == "compiled"
    whole = model.forward([Span(tokens, 0, [20, 21, 22, 23, 24], 70)])
    error = (torch.cat([begin, end]) - whole).square().mean().sqrt() / whole.std()
    assert error < (1e-5 if dtype == "float32" else 0.05)


def test_goes_on_as_it_is_when_compiling_fails(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "compile_model", lambda *_: 1 / 0)
    model, _ = load_model(LoadOptions(path=path, dtype="float32", num_blocks=64))
    assert model.wait(300)  # type: ignore[attr-defined]
    run_in_chunks(model, 96)
    assert model.backend == "cpu"
