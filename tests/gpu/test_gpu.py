"""What must hold on a GPU. Skipped where there is none; needs no Ray. Run: pytest tests/gpu -s"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import hold_chats
from fakes import make_request, run_to_end
from kin import FITTING, OTHERS
from local import Models, prompts
from packed import run_in_chunks
from tiny import TINY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tailserve.engine.distill.job import new_head
from tailserve.engine.model.attention import KVCache, Options, PackedSequences
from tailserve.engine.model.eagle_loading import borrowed_weights, make_head_model
from tailserve.engine.model.host import host_blocks
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.reference import ReferenceBackend
from tailserve.engine.model.runner import ModelRunner
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.sampling import noise_keys, pick
from tailserve.engine.types import Batch, BlockMove, RowJoin, SamplingParams

if torch.cuda.is_available():
    from tailserve.engine.model.cuda import CudaBackend
    from tailserve.engine.model.cuda_sampling import pick as pick_on_cuda
    from tailserve.engine.model.fused import FusedModel
    from tailserve.engine.model.graphs import GraphedModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(LlamaConfig(**TINY), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks"])
@pytest.mark.parametrize("longest", [300, 700])
def test_attention_equals_the_reference(longest: int, kind: str, dtype: str) -> None:
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
    lengths, contexts = [1, 5, longest, 1], [700, 5, longest + 30, 1]
    tables = torch.randperm(200)[:188].view(4, 47).numpy().astype(np.int32)
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


@pytest.mark.parametrize("kind", [*FITTING, *OTHERS])
def test_models_answer_as_on_the_cpu(kind: str, tmp_path: Path) -> None:
    """Float32, with windows that sequences outgrow."""
    path = save_model((FITTING | OTHERS)[kind], tmp_path)
    paged, _ = load_model(LoadOptions(path=path, dtype="float32", block_size=8, num_blocks=64, max_model_len=96))
    assert isinstance(paged, GraphedModel)
    assert isinstance(paged, FusedModel) == (kind in FITTING or kind == "narrow heads")
    eager = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for tokens, logits in run_in_chunks(paged, 96):
        with torch.no_grad():
            expected = eager(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_long_prompts_in_half_precision(dtype: str, tmp_path: Path) -> None:
    """Above what a graph takes, and chunks that want no logits, against float32 on the CPU."""
    path = save_model(LlamaConfig(**(TINY | {"max_position_embeddings": 1024})), tmp_path)
    paged, _ = load_model(LoadOptions(path=path, dtype=dtype, block_size=8, num_blocks=128))
    eager = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(96, (1000,), generator=torch.Generator().manual_seed(5)).tolist()
    blocks = list(range(125))
    paged.forward([Span(tokens[:600], 0, blocks, 0)])
    paged.forward([Span(tokens[600:700], 600, blocks, 0)])
    actual = paged.forward([Span(tokens[700:], 700, blocks, 40)]).cpu()
    with torch.no_grad():
        expected = eager(torch.tensor([tokens])).logits[0, -40:]
    assert ((actual - expected).square().mean().sqrt() / expected.std()).item() < 0.1


def test_hidden_states_of_graphs_are_those_of_the_cpu(path: str) -> None:
    """In graphs of two sizes, captured again for it."""
    features = []
    for device, attention in (("cpu", "reference"), ("cuda", "auto")):
        paged, _ = load_model(
            LoadOptions(path=path, dtype="float32", device=device, attention_backend=attention, block_size=8, num_blocks=64)
        )
        paged.tap([0, 2])
        for spans in ([Span([5, 6, 7], 0, [3], 0), Span([8], 0, [4], 1)], [Span(list(range(9, 29)), 3, [3, 5, 6], 1)]):
            paged.forward(spans)
            assert paged.features is not None
            features.append(paged.features.float().cpu())
    torch.testing.assert_close(features[:2], features[2:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("vocab", [96, 32000, 151936])
def test_picks_what_the_reference_picks(vocab: int) -> None:
    """In part from flat logits, where noise alone decides."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(256, vocab, generator=generator) * torch.linspace(0, 4, 256).unsqueeze(1)
    temperatures = [0.0, 0.7, 1.0, 3.0] * 64
    keys = noise_keys(list(range(256)), [3] * 256)
    actual = pick_on_cuda(logits.cuda(), temperatures, keys).cpu()
    assert torch.equal(actual, pick(logits, temperatures, keys))


def test_an_eagle_head_says_what_it_says_on_the_cpu(path: str) -> None:
    torch.manual_seed(3)
    verifier = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    head = new_head(verifier, (0, 2), torch.arange(5, 96)).requires_grad_(False)
    features = torch.randn(9, 2 * 64)
    answers = []
    for device, attention in (("cpu", "reference"), ("cuda", "auto")):
        weights = [weight.to(device) for weight in borrowed_weights(Path(path), torch.float32)]
        options = LoadOptions(path=path, device=device, attention_backend=attention, block_size=8)
        model = make_head_model(deepcopy(head).to(device), *weights, options, num_blocks=20, max_model_len=96)
        with torch.inference_mode():
            states, first = model.step([Span(list(range(5, 14)), 0, [3, 4], 1)], model.fuse(features))
            answers.append(torch.cat([first, model.step([Span([20], 9, [3, 4], 1)], states)[1]]).cpu())
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def test_a_step_that_reads_nothing_takes_as_long_as_its_work(path: str) -> None:
    runner = ModelRunner(Models(path, device="cuda", num_blocks=64, block_size=8).paged)
    join = RowJoin(0, list(range(3, 93)), 90, list(range(12)), SamplingParams(max_tokens=1, seed=0))
    # Long enough that nobody could be done by chance.
    torch.cuda._sleep(10**8)
    runner.run(Batch(0, [0], [0], [40], [False], {}, {}, [join], []))
    assert torch.cuda.current_stream().query()


def test_step_time_against_the_memory_bandwidth_floor(tmp_path: Path) -> None:
    """Prints; asserts only that the step runs. A Llama of about 1.1 billion parameters with random weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    paged, info = load_model(LoadOptions(path=str(tmp_path), dtype="bfloat16", max_num_seqs=64))
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    buffer = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * buffer.numel() / _seconds(lambda: buffer.clone())
    # Two for each weight and token; the embedding is looked up, not multiplied with.
    operations = weights - 2 * config.vocab_size * config.hidden_size
    print(f"\n{torch.cuda.get_device_name()}: memory copies {bandwidth / 1e12:.2f} TB/s; weights {weights / 1e9:.2f} GB")
    chance = np.random.default_rng(0)
    for batch, context, tokens in (
        (1, 300, 1),
        (8, 300, 1),
        (32, 300, 1),
        (32, 2000, 1),
        (8, 300, 5),
        (1, 0, 512),
        (1, 0, 2048),
    ):
        each = -(-(context + tokens) // info.block_size)
        blocks = chance.permutation(info.num_blocks)[: batch * each].reshape(batch, each)
        spans = [Span([5] * tokens, context, row.tolist(), 1) for row in blocks]
        keys = noise_keys(list(range(batch)), [context] * batch)
        step = _seconds(lambda spans=spans: paged.forward(spans))
        answer = _seconds(lambda spans=spans, keys=keys: paged.pick(paged.forward(spans), [0.7] * len(spans), keys).tolist())
        floor = (weights + batch * context * info.kv_bytes_per_token) / bandwidth
        rate = operations * batch * tokens / step / 1e12
        print(
            f"{batch} sequences, context {context}, {tokens} tokens each: step {step * 1e3:.2f} ms, with the answer "
            f"{answer * 1e3:.2f} ms; floor {floor * 1e3:.2f} ms, {step / floor:.1f}x; {rate:.0f} TFLOP/s"
        )
        assert step > 0


def _seconds(work: Callable[[], object], count: int = 20) -> float:
    work()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count
