"""The compiled decoder against transformers, and against itself in other batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kin import FITTING, OTHERS
from numba import njit
from packed import run_in_chunks
from tiny import TINY, save_model

from tailserve.engine.errors import ConfigError
from tailserve.engine.model import avx2
from tailserve.engine.model.attention import KVCache, Options, PackedSequences, as_array
from tailserve.engine.model.kernels import pick_all
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.memory import aligned
from tailserve.engine.model.microkernel import LANES, PORTABLE_HEIGHTS, heights, portable_product, product
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.paged_kernels import attend
from tailserve.engine.model.panels import copy_blocks, panel_shapes
from tailserve.engine.model.reference import ReferenceBackend
from tailserve.engine.model.spans import Span, query_tiles
from tailserve.engine.model.vectors import exp, read, write
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.sampling import noise_keys, pick

pytestmark = pytest.mark.cores

needs_avx2 = pytest.mark.skipif(not avx2.HAS_AVX2, reason="no AVX2")


def _load(path: str, dtype: str, **more: Any) -> PagedModel:
    return load_model(LoadOptions(path=path, dtype=dtype, num_blocks=64, **more))[0]


@pytest.mark.parametrize("kind", FITTING)
def test_agrees_with_eager_in_float32(kind: str, tmp_path: Path) -> None:
    path = save_model(FITTING[kind], tmp_path)
    paged = _load(path, "float32")
    assert paged.backend == "compiled"
    eager = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for tokens, logits in run_in_chunks(paged, 100):
        with torch.no_grad():
            expected = eager(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", OTHERS)
def test_leaves_other_models_to_transformers(kind: str, tmp_path: Path) -> None:
    path = save_model(OTHERS[kind], tmp_path)
    assert _load(path, "float32").backend == "cpu"


def test_backend_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_model(OTHERS["narrow heads"], tmp_path)
    with pytest.raises(ConfigError, match="built like Llama") as caught:
        _load(path, "float32", attention_backend="compiled")
    assert caught.value.param == "attention_backend"


@pytest.mark.parametrize("kind", ["llama", "llama, 40 heads for one of keys", "llama, wider than its heads", "mistral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_the_batch(dtype: str, kind: str, tmp_path: Path) -> None:
    paged = _load(save_model(FITTING[kind], tmp_path), dtype)
    assert paged.backend == "compiled"
    for tokens, together in run_in_chunks(paged, 100):
        whole = paged.forward([Span(tokens, 0, list(range(5)), len(tokens))])
        assert torch.equal(together, whole)
        one_by_one = [paged.forward([Span([token], n, list(range(5)), 1)]) for n, token in enumerate(tokens)]
        assert torch.equal(together, torch.cat(one_by_one))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_chunk_that_wants_no_logits_only_fills_the_cache(dtype: str, tmp_path: Path) -> None:
    paged = _load(save_model(FITTING["llama"], tmp_path), dtype)
    tokens = list(range(40))
    whole = paged.forward([Span(tokens, 0, [0, 1, 2], 1)])
    assert paged.forward([Span(tokens[:39], 0, [3, 4, 5], 0)]).shape == (0, 100)
    assert torch.equal(paged.forward([Span(tokens[39:], 39, [3, 4, 5], 1)]), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_what_else_is_asked_for(dtype: str, tmp_path: Path) -> None:
    """Behind the last layer's keys and values, only tokens whose logits or states are wanted are computed."""
    paged = _load(save_model(FITTING["llama"], tmp_path), dtype)
    tokens, blocks = list(range(60)), [list(range(begin, begin + 4)) for begin in (0, 4, 8)]
    spans = [Span(tokens[:60], 0, blocks[0], 3), Span(tokens[:50], 0, blocks[1], 1), Span(tokens[:9], 0, blocks[2], 9)]
    alone = [paged.forward([Span(span.token_ids, 0, span.block_ids, len(span.token_ids))]) for span in spans]
    whole = torch.cat([logits[-span.num_logits :] for span, logits in zip(spans, alone, strict=True)])
    assert torch.equal(paged.forward(spans), whole)
    some = paged.forward([*spans[:1], Span(tokens[:50], 0, blocks[1], 0), *spans[2:]])
    assert torch.equal(some, torch.cat([whole[:3], whole[4:]]))
    paged.tap([0, TINY["num_hidden_layers"] - 1])
    assert torch.equal(paged.forward(spans), whole)
    assert paged.features is not None
    together = paged.features.clone()
    paged.forward([spans[1]])
    assert torch.equal(paged.features, together[60:110])


def test_bfloat16_is_as_close_to_float32_as_transformers(tmp_path: Path) -> None:
    path = save_model(FITTING["llama"], tmp_path)
    exact, paged = _load(path, "float32"), _load(path, "bfloat16")
    eager = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    ours, theirs = [], []
    for (tokens, want), (_, got) in zip(run_in_chunks(exact, 100), run_in_chunks(paged, 100), strict=True):
        with torch.no_grad():
            theirs.append((eager(torch.tensor([tokens])).logits[0].float() - want).square().mean())
        ours.append((got - want).square().mean())
    assert sum(ours) < sum(theirs)


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (product, heights),
        (portable_product, lambda _: PORTABLE_HEIGHTS),
        pytest.param(avx2.product, lambda _: range(1, avx2.TALLEST + 1), marks=needs_avx2),
    ],
    ids=["this CPU's", "portable", "AVX2"],
)
def test_product_equals_a_matrix_product(make: Any, sizes: Any, kind: Any, vectors: int) -> None:
    pair = 2 if kind == "bfloat16" else 1
    multiply = make(kind, vectors, 16 // pair)

    @njit
    def run(rows, x, panel, out):  # type: ignore[no-untyped-def]
        address, stride, strip = x.ctypes.data, x.strides[0], 16 * x.itemsize
        there, strips = panel.ctypes.data, x.shape[1] // 16
        for add in range(2):
            multiply(rows, address, stride, strip, there, out.ctypes.data, out.strides[0], strips, add, there, 3)

    dtype = getattr(torch, kind)
    weight = torch.randn(vectors * LANES, 48).to(dtype)
    packed = weight.view(vectors * LANES, 48 // pair, pair).transpose(0, 1).reshape(48 // pair, -1).contiguous()
    panel = aligned(tuple(packed.shape), np.uint16 if pair == 2 else np.float32)
    panel[...] = packed.view(torch.uint16).numpy() if pair == 2 else packed.numpy()
    for rows in sizes(kind):
        x = torch.randn(rows, 48).to(dtype)
        out = np.full((rows + 1, vectors * LANES), 7.0, np.float32)
        run(rows, x.view(torch.uint16).numpy() if pair == 2 else x.numpy(), panel, out)
        expected = 2 * x.float() @ weight.float().T
        torch.testing.assert_close(torch.from_numpy(out[:rows]), expected, rtol=1e-4, atol=1e-4)
        assert (out[rows] == 7.0).all()


def test_exp_is_exact_to_float32() -> None:
    @njit
    def run(x, out):  # type: ignore[no-untyped-def]
        for i in range(0, x.nbytes, 64):
            write(out.ctypes.data + i, exp(read(x.ctypes.data + i)))

    x = np.linspace(-87, 88, 16_000, dtype=np.float32)
    out = np.empty_like(x)
    run(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=3e-7)
    under = np.full(16, -1e30, np.float32)
    run(under, out)
    assert not out[:16].any()


def _pick(logits: np.ndarray, temperatures: list[float], keys: np.ndarray) -> np.ndarray:
    padded = np.zeros((len(logits), logits.shape[1] // 32 * 32 + 32), np.float32)
    padded[:, : logits.shape[1]] = logits
    out, lines = np.empty(len(logits), np.int64), np.zeros(16, np.int64)
    inverse = np.array([1 / t if t else 0.0 for t in temperatures], np.float32)
    team = (0, 2, False, lines.ctypes.data)
    pick_all(padded.ctypes.data, padded.strides[0], logits.shape[1], inverse, keys, out, team)
    return out


def test_greedy_choice_takes_the_first_of_equals() -> None:
    chance = np.random.default_rng(1)
    for columns in (5, 100, 5000):
        logits = chance.integers(-9, 0, (7, columns)).astype(np.float32)
        assert (_pick(logits, [0.0] * 7, np.zeros((7, 2), np.int32)) == logits.argmax(1)).all()


@pytest.mark.parametrize("columns", [5, 1000, 49152])
def test_compiled_draws_are_those_of_torch(columns: int) -> None:
    logits = np.random.default_rng(2).normal(0, 3, (200, columns)).astype(np.float32)
    temperatures = [0.0, 0.3, 1.0, 2.0] * 50
    keys = noise_keys(list(range(200)), list(range(1000, 1200)))
    drawn = _pick(logits, temperatures, keys)
    assert (drawn == pick(torch.from_numpy(logits), temperatures, keys).numpy()).all()
    assert len(set(drawn[2::4].tolist())) > 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_equals_the_reference(window: int | None, dtype: str, threads: int) -> None:
    """Within the rounding of the type: generating sequences, a whole prompt, the last chunk of another."""
    heads, kv_heads, head_dim, size = 6, 2, 64, 32
    lengths, contexts = [1, 5, 40, 1], [150, 5, 57, 1]
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(
        num_layers=2,
        num_blocks=30,
        block_size=size,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=kind,
        device=torch.device("cpu"),
    )
    for tensor in (cache.keys[1], cache.values[1]):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    tables = torch.randperm(30, generator=generator)[:20].view(4, 5).numpy().astype(np.int32)
    query_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    sequences = PackedSequences(query_starts, np.array(contexts, np.int32), tables, torch.empty(0))
    query = torch.randn(sum(lengths), heads, head_dim, generator=generator).to(kind)
    expected = ReferenceBackend().attend(query, cache, 1, sequences, Options(0.125, window))
    keys, values = (
        np.zeros(shape, np.uint16 if dtype == "bfloat16" else np.float32)
        for shape in panel_shapes(2, 30, kv_heads, size, head_dim, 4 // query.element_size())
    )
    copy_blocks(cache, np.arange(30), keys, values)
    grouped = as_array(query.view(-1, kv_heads, heads // kv_heads, head_dim).transpose(0, 1).contiguous())
    out = np.zeros((heads * head_dim // 32, sum(lengths), 32), grouped.dtype)
    lines = np.zeros(16, np.int64)
    tiles = query_tiles(query_starts, np.array(contexts) - np.array(lengths), 4)
    places = (tiles, tiles[:, 1].copy())
    team = (threads - 1, threads, False, lines.ctypes.data)
    attend(1, grouped, keys, values, places, tables, np.float32(0.125), window or 0, out, team)
    flat = np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(sum(lengths), heads, head_dim)
    actual = torch.from_numpy(flat.view(np.int16)).view(kind) if dtype == "bfloat16" else torch.from_numpy(flat)
    close = 1e-5 if dtype == "float32" else 2**-6
    torch.testing.assert_close(actual, expected, rtol=close, atol=close)
