"""What must hold on a GPU. Skipped where there is none; needs no Ray. Run: pytest tests/gpu -s"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import hold_chats
from fakes import make_request, run_to_end
from local import Models, prompts
from tiny import TINY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tailserve.engine.model.attention import KVCache, Options, PackedSequences
from tailserve.engine.model.host import host_blocks
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.reference import ReferenceBackend
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions
from tailserve.engine.types import BlockMove

if torch.cuda.is_available():
    from tailserve.engine.model.cuda import CudaBackend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(LlamaConfig(**TINY), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks"])
def test_attention_equals_the_reference(kind: str, dtype: str) -> None:
    options = Options(
        scaling=0.125,
        sliding_window=100 if kind == "window" else None,
        softcap=3.0 if kind == "softcap" else None,
        sinks=torch.linspace(-1, 4, 9, device="cuda") if kind == "sinks" else None,
    )
    cache = KVCache(
        num_layers=1,
        num_blocks=200,
        block_size=16,
        kv_heads=3,
        head_dim=64,
        dtype=getattr(torch, dtype),
        device=torch.device("cuda"),
    )
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.normal_()
    lengths, contexts = [1, 5, 300, 1], [700, 5, 330, 1]
    tables = torch.randperm(200)[:180].view(4, 45).numpy().astype(np.int32)
    query_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    slots = torch.empty(0, device="cuda")
    sequences = PackedSequences(query_starts, np.array(contexts, np.int32), tables, slots)
    query = torch.randn(sum(lengths), 9, 64, dtype=cache.keys[0].dtype, device="cuda")
    expected = ReferenceBackend().attend(query, cache, 0, sequences, options)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    actual = CudaBackend(132).attend(query, cache, 0, sequences, options)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["cuda", "reference"])
@pytest.mark.parametrize("draft", ["none", "ngram", 0.0])
def test_answers_equal_those_of_the_cpu(path: str, draft: str | float, backend: str) -> None:
    """Float32, sampled; with the CUDA backend short batches run as graphs, long ones kernel by kernel."""
    answers = []
    for device, attention in (("cpu", "reference"), ("cuda", backend)):
        engine = Models(path, num_blocks=200, block_size=8, device=device, attention_backend=attention).engine(draft)
        for n, prompt in enumerate(prompts(12, TINY["vocab_size"])):
            engine.add(make_request(prompt, id=str(n), seed=n, max_tokens=24, temperature=0.8))
        answers.append(run_to_end(engine).tokens)
    assert answers[0] == answers[1]


def test_blocks_that_were_in_host_memory_are_what_they_were(path: str) -> None:
    models = Models(path, device="cuda", num_blocks=100, block_size=16, max_model_len=128)
    openings = list(prompts(5, int(str(TINY["vocab_size"])), longest=24))
    held = []
    for config in ({}, {"num_blocks": 18, "num_host_blocks": 40}):
        engine = models.engine(max_num_seqs=2, **config)
        held.append(hold_chats(engine, openings, turns=4, answer=12, question=9, vocab=96))
        assert (engine.stats.host_cache_hits > 100) == bool(config)
    assert held[0] == held[1]


def test_moves_are_made_in_their_order() -> None:
    parts = [torch.arange(4, dtype=torch.bfloat16, device="cuda").view(4, 1, 1) + 10 * n for n in range(2)]
    moves = [(0, 0, True), (1, 1, True), (0, 1, False), (2, 0, True), (3, 0, False)]
    host_blocks(parts, 2).make([BlockMove(block, host_block, to_host=to) for block, host_block, to in moves])
    assert [part.flatten().tolist() for part in parts] == [[1, 1, 2, 2], [11, 11, 12, 12]]


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
    weights = 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
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
