"""The EAGLE head: as it drafts, as it is taught, and behind an engine. With random weights, in float32."""

from __future__ import annotations

import threading
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fakes import engine_config, make_request, run_to_end
from local import LocalDrafter, Models, prompts
from tiny import TINY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tailserve.engine.distill.batches import TrainingBatch
from tailserve.engine.distill.job import borrow, new_head
from tailserve.engine.distill.unroll import unroll
from tailserve.engine.engine import Engine
from tailserve.engine.errors import ConfigError
from tailserve.engine.model import eagle_loading
from tailserve.engine.model.avx512 import HAS_INT8_DOT
from tailserve.engine.model.combined_drafter import CombinedDrafter
from tailserve.engine.model.eagle import EagleConfig, EagleHead, load_eagle
from tailserve.engine.model.eagle_compiled import CompiledHead
from tailserve.engine.model.eagle_drafter import LEAST_BESIDE, EagleDrafter
from tailserve.engine.model.eagle_loading import borrowed_weights, load_eagle_drafter, make_head_model
from tailserve.engine.model.eagle_torch import TorchHead
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.model.reference import ReferenceBackend
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.drafter import Draft, DraftRow, DraftWork, RowStates, StateMessage
from tailserve.engine.speculation.ngram import NgramDrafter

pytestmark = pytest.mark.cores

LAYERS = (0, 2)
VOCAB = TINY["vocab_size"]


@pytest.fixture(scope="module")
def verifier(tiny_llama: str):  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture
def head(verifier) -> EagleHead:  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    head = new_head(verifier, LAYERS, torch.arange(5, VOCAB))
    for weight in head.parameters():
        if weight.ndim == 2:
            weight.data += 0.2 * torch.randn(weight.shape)
    return head.requires_grad_(False)


def drafter(head: EagleHead, folder: str, num_blocks: int = 200) -> EagleDrafter:
    options = LoadOptions(path=folder, attention_backend="cpu", block_size=8, num_threads=1)
    weights = borrowed_weights(Path(folder), torch.float32)
    model = make_head_model(head, *weights, options, num_blocks=num_blocks, max_model_len=256)
    return EagleDrafter(model, head.draft_tokens.tolist())


def message(step: int, row: int, start: int, next_tokens: list[int], features: torch.Tensor) -> StateMessage:
    data = features.bfloat16().view(torch.int16).numpy().tobytes()
    return StateMessage(step, [RowStates(row, start, next_tokens, data)], [])


@pytest.mark.parametrize("backend", ["reference", "cpu", "compiled"])
def test_hidden_states_are_transformers_own(tmp_path: Path, backend: str) -> None:
    path = save_model(LlamaConfig(**(TINY | {"hidden_size": 128})), tmp_path)
    verifier = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    options = LoadOptions(path=path, dtype="float32", attention_backend=backend, block_size=16, num_blocks=64)
    paged, _ = load_model(options)
    paged.tap(LAYERS)
    ids = [5, 9, 30, 31, 7, 60, 2, 44]
    paged.forward([Span(ids[:5], 0, [3], 0)])
    first = paged.features.clone()
    paged.forward([Span(ids, 0, [7], 1), Span(ids[5:], 5, [3], 1)])
    both = paged.features
    with torch.no_grad():
        hidden = {}
        for n in LAYERS:
            verifier.model.layers[n].register_forward_hook(lambda _m, _i, out, n=n: hidden.update({n: out}))
        verifier(torch.tensor([ids]))
    expected = torch.cat([hidden[n][0] for n in LAYERS], -1)
    torch.testing.assert_close(first.float(), expected[:5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[: len(ids)].float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[len(ids) :].float(), expected[5:], rtol=1e-4, atol=1e-4)


def test_it_drafts_as_it_was_taught(tiny_llama: str, verifier, head: EagleHead) -> None:  # type: ignore[no-untyped-def]
    """Whatever pieces the states come in: the training's unrolled pass over the same tokens says the same."""
    torch.manual_seed(0)
    depth, ids = 3, torch.randint(5, VOCAB, (30,)).tolist()
    features = torch.randn(len(ids), len(LAYERS) * TINY["hidden_size"]).bfloat16().float()
    known = 22
    rows = drafter(head, tiny_llama)
    at = 0
    for count in (17, 1, 3):
        rows.take(message(at, 1, at, ids[at + 1 : at + count + 1], features[at : at + count]))
        at += count
        # A draft on the way must leave nothing behind.
        rows.run(DraftWork(0, at, [DraftRow(1, at + 1, [], 2)], []))
    rows.take(message(99, 1, at, ids[at + 1 : known + 1], features[at:known]))
    draft = rows.run(DraftWork(0, 99, [DraftRow(1, 0, ids[: known + 1], depth)], [])).drafts[1]
    assert draft.base_len == known + 1
    assert len(draft.token_ids) == depth
    # Teacher forcing on the draft's own tokens.
    tokens = torch.tensor([ids[: known + 1] + draft.token_ids])
    padded = torch.zeros(1, tokens.shape[1], features.shape[1])
    padded[0, :known] = features[:known]
    frozen, _ = borrow(verifier, head)
    learnt = torch.ones(tokens.shape, dtype=torch.bool)
    for step, logits in enumerate(unroll(head, frozen, TrainingBatch(tokens, padded, learnt), depth)):
        probs = logits[known - 1 + step].softmax(-1)
        assert head.draft_tokens[probs.argmax()] == draft.token_ids[step]
        assert probs.max().item() == pytest.approx(draft.confidences[step], rel=1e-3)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_head_says_what_pytorch_says(dtype: torch.dtype, int8: bool) -> None:
    """Prompt, several rows at once, single tokens, a window; integers within what they round."""
    if int8 and not HAS_INT8_DOT:
        pytest.skip("no AVX512-VNNI")
    torch.manual_seed(1)
    config = EagleConfig(
        hidden_size=96, vocab_size=200, num_verifier_layers=4, feature_layers=(1, 3), intermediate_size=160,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, draft_vocab_size=70,
    )  # fmt: skip
    head = EagleHead(config).requires_grad_(False)
    for weight in head.parameters():
        weight.data = 0.15 * torch.randn(weight.shape) if weight.ndim == 2 else 1 + 0.1 * torch.randn(weight.shape)
        # As the compiled head keeps them: rounding of the weights is not what is compared.
        weight.data = weight.data.to(dtype).float()
    embedding, rows = torch.randn(200, 96).to(dtype), torch.randn(70, 96).to(dtype)
    compiled = CompiledHead(
        head, embedding, rows, num_blocks=12, block_size=16, max_model_len=192, window=24, num_threads=2, int8=int8
    )
    exact = TorchHead(
        deepcopy(head).float(), embedding.float(), rows.float(), ReferenceBackend(), num_blocks=12, block_size=16, window=24
    )
    features = torch.randn(50, 192).bfloat16()
    states = compiled.fuse(features)
    # In bfloat16 each of 192 factors is rounded, and the sum: its deviation is 2, the error's 0.003, and there are 4,800.
    torch.testing.assert_close(states, exact.fuse(features.float()), rtol=1e-2, atol=2e-2)
    tokens = torch.randint(200, (50,)).tolist()
    first, second = [3, 1, 7], [2, 5]
    steps = [
        ([Span(tokens[:33], 0, first, 1)], states[:33]),
        ([Span(tokens[33:34], 33, first, 1), Span(tokens[34:50], 0, second, 3)], states[33:50]),
        ([Span(tokens[5:6], 34, first, 1), Span(tokens[6:7], 16, second, 1)], states[:2]),
    ]
    for spans, given in steps:
        (out, logits), (want, scores) = compiled.step(spans, given), exact.step(spans, given)
        scale = 0.1 if int8 else 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(out, want, rtol=scale, atol=scale * want.std().item())
        torch.testing.assert_close(logits, scores, rtol=scale, atol=scale * scores.std().item())


def test_a_head_whose_code_is_not_on_disk_runs_and_says_if_compiling_fails(
    head: EagleHead, tiny_llama: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(eagle_loading, "can_compile_head", lambda *_: True)
    monkeypatch.setattr(eagle_loading, "head_is_cached", lambda _: False)
    monkeypatch.setattr(eagle_loading, "compile_elsewhere", fail)
    embedding, rows = borrowed_weights(Path(tiny_llama), torch.float32)
    options = LoadOptions(path=tiny_llama, block_size=8, num_threads=1)
    model = make_head_model(head, embedding, rows, options, num_blocks=20, max_model_len=64)
    for thread in threading.enumerate():
        if thread.name == "head compiler":
            thread.join(10)
    assert isinstance(model, TorchHead)
    assert "the disk is full" in caplog.text


def test_compiled_code_takes_over_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64
    config = LlamaConfig(**TINY | {"hidden_size": size, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    save_model(config, tmp_path / "verifier")
    verifier = AutoModelForCausalLM.from_pretrained(tmp_path / "verifier", dtype=torch.float32)
    new_head(verifier, LAYERS, torch.arange(64)).save(tmp_path / "head")
    options = LoadOptions(path=str(tmp_path / "verifier"), dtype="float32", num_threads=1)
    compiled = threading.Event()
    monkeypatch.setattr(eagle_loading, "head_is_cached", lambda _: compiled.is_set())
    monkeypatch.setattr(eagle_loading, "compile_elsewhere", lambda *_: compiled.wait(60))
    rows = load_eagle_drafter(tmp_path / "head", options, num_blocks=8)
    assert isinstance(rows._model, TorchHead)
    features = torch.randn(8, len(LAYERS) * size)
    rows.take(message(0, 1, 0, list(range(1, 6)), features[:5]))
    assert rows.run(DraftWork(0, 0, [DraftRow(1, 0, list(range(6)), 3)], [])).drafts != {}
    compiled.set()
    for thread in threading.enumerate():
        if thread.name == "head compiler":
            thread.join(60)
    fresh = load_eagle_drafter(tmp_path / "head", options, num_blocks=8)
    for each in (rows, fresh):
        each.take(message(1, 1, 5, [6], features[5:6]))
        assert isinstance(each._model, CompiledHead)
    asked = DraftWork(1, 1, [DraftRow(1, 6, [6], 3)], [])
    assert rows.run(asked).drafts == fresh.run(asked).drafts != {}
    rows.take(StateMessage(2, [], [1], False))
    assert rows._pool.num_free == 8


def test_a_gap_begins_a_row_anew_and_missing_states_mean_no_draft(tiny_llama: str, head: EagleHead) -> None:
    torch.manual_seed(0)
    features = torch.randn(40, len(LAYERS) * TINY["hidden_size"])
    rows, fresh = drafter(head, tiny_llama), drafter(head, tiny_llama)
    rows.take(message(0, 1, 0, list(range(1, 6)), features[:5]))
    asked = DraftWork(0, 1, [DraftRow(1, 0, list(range(12)), 3)], [])
    assert rows.run(asked).drafts == {}
    for each in (rows, fresh):
        each.take(message(1, 1, 8, [9, 10, 11], features[8:11]))
    assert rows.run(asked).drafts == fresh.run(asked).drafts != {}


@pytest.mark.parametrize("told_by", ["the verifier", "the router", "a verifier that is new"])
def test_blocks_come_back(tiny_llama: str, head: EagleHead, told_by: str) -> None:
    """One row fills the cache: the next one drafts only if the last gave everything back."""
    features = torch.zeros(40, len(LAYERS) * TINY["hidden_size"])
    rows = CombinedDrafter(NgramDrafter(), drafter(head, tiny_llama, num_blocks=6))
    for row in range(10):
        rows.take(message(row, row, 0, list(range(1, 41)), features))
        assert row in rows.run(DraftWork(0, row, [DraftRow(row, 0, list(range(41)), 3)], [])).drafts
        rows.take(message(row, row + 100, 0, list(range(1, 41)), features))
        assert rows.run(DraftWork(0, row, [DraftRow(row + 100, 0, list(range(41)), 3)], [])).drafts == {}
        if told_by == "the router":
            rows.run(DraftWork(0, row, [], [row]))
        else:
            new = told_by == "a verifier that is new"
            rows.take(StateMessage(row, [], [] if new else [row], fresh=new))


def test_tokens_that_are_unlikely_to_be_reached_are_not_drafted(tiny_llama: str, head: EagleHead) -> None:
    torch.manual_seed(0)
    rows = drafter(head, tiny_llama)
    features = torch.randn(5, len(LAYERS) * TINY["hidden_size"])
    rows.take(message(0, 1, 0, [1, 2, 3, 4, 5], features))
    draft = rows.run(DraftWork(0, 0, [DraftRow(1, 0, list(range(6)), 8, least=0.999)], [])).drafts[1]
    assert len(draft.token_ids) == 1


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("ngrams", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_the_head(
    tiny_llama: str, head: EagleHead, ngrams: bool, temperature: float, width: int
) -> None:
    models = Models(tiny_llama, num_blocks=200, block_size=16)
    wanted = [
        make_request(prompt, id=str(n), seed=n, max_tokens=20, temperature=temperature, scope="all")
        for n, prompt in enumerate(prompts(6, VOCAB))
    ]
    plain = models.engine()
    for request in wanted:
        plain.add(request)
    expected = run_to_end(plain).tokens
    rows = drafter(head, tiny_llama)
    model = CombinedDrafter(NgramDrafter(), rows) if ngrams else rows
    models.paged.tap(LAYERS)
    config = engine_config(
        max_model_len=models.info.max_model_len,
        num_blocks=200,
        block_size=16,
        max_num_batched_tokens=64,
        draft_branches=width,
    )
    executor = LocalExecutor(models.paged, publish=model.take, num_blocks=200)
    engine = Engine(config, executor, LocalDrafter(model))
    # The second round's prompts are cached, so their states never come.
    for _ in range(2):
        for request in wanted:
            engine.add(request)
        assert run_to_end(engine).tokens == expected
    assert engine.stats.draft_tokens > 100
    assert ("eagle beside" in engine.stats.drafted_by_kind) == (width > 1)


def test_a_branch_drafts_what_its_first_token_leads_to(tiny_llama: str, head: EagleHead) -> None:
    """The same head, told that the branch's first token is the text, drafts the branch's others."""
    torch.manual_seed(0)
    features = torch.randn(21, len(LAYERS) * TINY["hidden_size"])
    tokens = list(range(1, 22))
    rows = drafter(head, tiny_llama)
    rows.take(message(0, 1, 0, tokens, features))
    draft = rows.run(DraftWork(0, 0, [DraftRow(1, 0, [0, *tokens], 4, width=3)], [])).drafts[1]
    assert len(draft.others) == 2
    for other in draft.others:
        alone = drafter(head, tiny_llama)
        alone.take(message(0, 1, 0, tokens, features))
        chains = alone.begin(DraftWork(0, 0, [DraftRow(1, 0, [0, *tokens], 4)], []))
        (chain,) = chains[1]
        column = head.draft_tokens.tolist().index(other.token_ids[0])
        chain.draft.token_ids[:], chain.columns[:] = [other.token_ids[0]], [column]
        alone.go_on([chain])
        assert chain.token_ids == other.token_ids


def test_an_unlikely_branch_is_one_token_that_takes_no_step(tiny_llama: str, head: EagleHead) -> None:
    head.final_norm.weight.data *= 5  # so that it is sure of something
    features = torch.randn(5, len(LAYERS) * TINY["hidden_size"], generator=torch.Generator().manual_seed(0))

    def branches(least: float) -> list[Draft]:
        rows = drafter(head, tiny_llama)
        rows.take(message(0, 1, 0, [1, 2, 3, 4, 5], features))
        asked = DraftRow(1, 0, list(range(6)), 4, width=2, least=least)
        return rows.run(DraftWork(0, 0, [asked], [])).drafts[1].others

    (likely,) = branches(0.0)
    chance = likely.confidences[0]
    assert chance > LEAST_BESIDE
    assert len(likely.token_ids) == 4
    (single,) = branches(0.55 * chance)
    assert single.token_ids == likely.token_ids[:1]
    assert len(branches(0.45 * chance)[0].token_ids) > 1


def test_a_head_is_read_back_and_refused_where_it_does_not_fit(tiny_llama: str, head: EagleHead, tmp_path: Path) -> None:
    head.save(tmp_path)
    again = load_eagle(tmp_path)
    assert again.config == head.config
    torch.testing.assert_close(again.qkv.weight, head.qkv.weight, rtol=1e-2, atol=1e-2)
    assert torch.equal(again.draft_tokens, head.draft_tokens)
    load_eagle_drafter(tmp_path, LoadOptions(path=tiny_llama, dtype="float32"), num_blocks=8)
    with pytest.raises(ConfigError, match="tailserve distill"):
        head.check_fits(TINY["hidden_size"], VOCAB + 1, TINY["num_hidden_layers"])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="holds no EAGLE draft"):
        load_eagle(tmp_path)
