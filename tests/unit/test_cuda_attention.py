"""The CUDA kernels against the reference backend, by Triton's interpreter: no GPU, the same program."""

from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import needs_interpreter
from packed import run_in_chunks
from tiny import TINY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tailserve.engine.model import cuda
from tailserve.engine.model.attention import NAME, KVCache, Options, PackedSequences
from tailserve.engine.model.cuda import CudaBackend
from tailserve.engine.model.graphs import GraphedModel, Size, _Captured
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.reference import ReferenceBackend
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

pytestmark = needs_interpreter

LENGTHS, CONTEXTS = [1, 5, 40, 1], [70, 5, 57, 1]
"""A generating sequence, a whole prompt, the last chunk of another, and one token alone."""


def random_batch(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, KVCache, PackedSequences]:
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(
        num_layers=1,
        num_blocks=40,
        block_size=8,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    tables = torch.randperm(40, generator=generator)[:36].view(4, 9).numpy().astype(np.int32)
    query_starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    sequences = PackedSequences(query_starts, np.array(CONTEXTS, np.int32), tables, torch.empty(0))
    return torch.randn(sum(LENGTHS), heads, head_dim, generator=generator).to(dtype), cache, sequences


@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads", "head_dim", "processors"),
    [
        ("plain", 4, 4, 16, 1),
        ("plain", 20, 1, 24, 4),
        ("window", 9, 3, 64, 1),
        ("window", 4, 4, 16, 100),
        ("softcap", 4, 2, 32, 1),
        ("sinks", 4, 2, 16, 8),
        ("plain", 4, 2, 96, 1),
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_equals_the_reference(
    kind: str, heads: int, kv_heads: int, head_dim: int, processors: int, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`processors` decides into how many parts contexts are split; long batches have larger tiles."""
    monkeypatch.setattr(cuda, "LONG", 10 if long else 512)
    query, cache, sequences = random_batch(heads, kv_heads, head_dim, torch.float32)
    options = Options(
        scaling=head_dim**-0.5,
        sliding_window=20 if kind == "window" else None,
        softcap=3.0 if kind == "softcap" else None,
        sinks=torch.linspace(-1, 4, heads) if kind == "sinks" else None,
    )
    expected = ReferenceBackend().attend(query, cache, 0, sequences, options)
    actual = CudaBackend(processors).attend(query, cache, 0, sequences, options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Replayed:
    """Stands in for a CUDA graph: runs again what was captured, on the same memory."""

    def __init__(self, model: "OnCpu", size: Size) -> None:
        self._model, self._size = model, size

    def replay(self) -> None:
        self._model._outputs[: self._size.wanted] = self._model._run(self._size)


class OnCpu(GraphedModel):
    def _capture(self, size: Size, pool: object) -> _Captured:
        if len(self._outputs) < size.wanted:
            self._outputs = torch.full((size.wanted, TINY["vocab_size"]), torch.nan)
        return _Captured(Replayed(self, size), None)


def test_a_graph_filled_up_to_its_size_equals_the_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(LlamaConfig(**TINY), tmp_path)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    plain, _ = load_model(
        LoadOptions(path=path, dtype="float32", attention_backend="reference", block_size=8, num_blocks=64)
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=NAME)
    cache = KVCache(
        num_layers=3, num_blocks=65, block_size=8, kv_heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu")
    )
    graphed = OnCpu(model, cache, CudaBackend(1), max_model_len=96)
    graphed.prepare()
    assert graphed.num_blocks == 64
    for (tokens, expected), (same, actual) in zip(run_in_chunks(plain, 96), run_in_chunks(graphed, 96), strict=True):
        assert tokens == same
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # Long prompts, of which few logits are wanted.
    prompts = [Span(list(range(3, 93)), 0, list(range(n, n + 12)), 2) for n in (0, 20)]
    torch.testing.assert_close(graphed.forward(prompts), plain.forward(prompts), rtol=1e-4, atol=1e-4)
