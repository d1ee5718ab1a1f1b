"""What must hold on a GPU. Skipped where there is none; needs no Ray. Run: pytest tests/gpu -s"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from fakes import make_request, run_to_end
from local import Models, prompts
from tiny import TINY, save_model
from transformers import LlamaConfig

from tailserve.engine.model.loading import load_model
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(LlamaConfig(**TINY), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("draft", ["none", "ngram", 0.0])
def test_answers_equal_those_of_the_cpu(path: str, draft: str | float) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        engine = Models(path, num_blocks=200, block_size=8, device=device, attention_backend="reference").engine(draft)
        for n, prompt in enumerate(prompts(12, TINY["vocab_size"])):
            engine.add(make_request(prompt, id=str(n), seed=n, max_tokens=24, temperature=0.8))
        answers.append(run_to_end(engine).tokens)
    assert answers[0] == answers[1]


def test_step_time_against_the_memory_bandwidth_floor() -> None:
    """Prints; asserts only that the step runs. A Llama of about 1.2 billion parameters with random weights."""
    import tempfile

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    with tempfile.TemporaryDirectory() as directory:
        paged, info = load_model(LoadOptions(path=save_model(config, Path(directory)), dtype="bfloat16", max_num_seqs=32))
    buffer = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * buffer.numel() * 20 / _seconds(lambda: buffer.clone(), 20)
    weights = sum(p.numel() * p.element_size() for p in paged.model.parameters())
    for batch in (1, 8, 32):
        blocks = [list(range(n * 20, n * 20 + 20)) for n in range(batch)]
        spans = [Span([5], 300, table, 1) for table in blocks]
        step = _seconds(lambda spans=spans: paged.forward(spans), 20) / 20
        floor = (weights + batch * 300 * info.kv_bytes_per_token) / bandwidth
        print(f"batch {batch}: step {step * 1e3:.2f} ms, floor {floor * 1e3:.2f} ms, {step / floor:.1f}x")
        assert step > 0


def _seconds(work, count: int) -> float:  # type: ignore[no-untyped-def]
    work()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
