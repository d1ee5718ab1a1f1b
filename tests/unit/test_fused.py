"""What CUDA runs of models built like Llama, by Triton's interpreter: no GPU, the same programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import needs_interpreter
from kin import FITTING, OTHERS
from tiny import TINY, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from tailserve.engine.model.attention import NAME, KVCache
from tailserve.engine.model.cuda import CudaBackend
from tailserve.engine.model.cuda_sampling import pick as cuda_pick
from tailserve.engine.model.fused import FusedModel, graphed_model
from tailserve.engine.model.graphs import GraphedModel
from tailserve.engine.model.paged import TransformersModel
from tailserve.engine.model.reference import ReferenceBackend
from tailserve.engine.model.selfcheck import eager_logits
from tailserve.engine.model.spans import Span
from tailserve.engine.speculation.sampling import noise_keys, pick

pytestmark = needs_interpreter


def empty_cache(model: PreTrainedModel) -> KVCache:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVCache(
        num_layers=config.num_hidden_layers,
        num_blocks=65,
        block_size=8,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        dtype=model.dtype,
        device=model.device,
    )


def load(config: PreTrainedConfig, folder: Path) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """A random model of two layers, and what it answers by itself."""
    path = save_model(type(config).from_dict(config.to_dict() | {"num_hidden_layers": 2, "layer_types": None}), folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    expected = eager_logits(model)
    model.set_attn_implementation(NAME)
    return model, expected


def graphed(model: PreTrainedModel, expected: list[torch.Tensor], *, whole: bool = True) -> GraphedModel:
    return graphed_model(model, empty_cache(model), CudaBackend(1), expected, max_model_len=96, whole=whole)


@pytest.mark.parametrize("kind", ["llama", "llama, 40 heads for one of keys", "mistral", "qwen2", "qwen3", "yarn"])
def test_answers_as_its_own_modules_do(kind: str, tmp_path: Path) -> None:
    """It is chosen where it does: in chunks, beside another sequence, with a window of 16."""
    assert isinstance(graphed(*load(FITTING[kind], tmp_path)), FusedModel)


@pytest.mark.parametrize(
    "kind", ["another structure", "a multiplier that modules do not show", "queries scaled by position"]
)
def test_leaves_other_models_to_their_modules(kind: str, tmp_path: Path) -> None:
    model, expected = load(OTHERS[kind], tmp_path)
    assert type(graphed(model, expected)) is GraphedModel


def test_leaves_a_part_of_a_model_to_its_modules(tmp_path: Path) -> None:
    model, expected = load(LlamaConfig(**TINY), tmp_path)
    assert type(graphed(model, expected, whole=False)) is GraphedModel


def test_hidden_states_are_those_of_its_own_modules(tmp_path: Path) -> None:
    model, expected = load(LlamaConfig(**TINY), tmp_path)
    spans = [Span([5, 6, 7], 0, [3], 0), Span([8], 0, [4], 1)]
    features = []
    for paged in (graphed(model, expected), TransformersModel(model, empty_cache(model), ReferenceBackend())):
        paged.tap([0, 1])
        paged.forward(spans)
        features.append(paged.features)
    assert features[0].shape == (4, 2 * 64)
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)


def test_a_chunk_that_wants_no_logits_only_fills_the_cache(tmp_path: Path) -> None:
    model, expected = load(LlamaConfig(**TINY), tmp_path)
    fused = graphed(model, expected)
    assert fused.forward([Span([5, 6, 7], 0, [3], 0)]).shape == (0, TINY["vocab_size"])
    after = fused.forward([Span([8], 3, [3], 1)])
    torch.testing.assert_close(after, fused.forward([Span([5, 6, 7, 8], 0, [9], 1)]), rtol=1e-4, atol=1e-4)


def test_weights_are_there_once(tmp_path: Path) -> None:
    model, expected = load(LlamaConfig(**TINY), tmp_path)
    layer = graphed(model, expected)._layers[0]  # type: ignore[attr-defined]
    for joined, name in ((layer.qkv, "self_attn.v_proj"), (layer.gate_up, "mlp.gate_proj")):
        own = model.get_submodule(f"model.layers.0.{name}").weight
        assert own.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


@pytest.mark.parametrize("vocab", [96, 9000])
def test_picks_what_the_reference_picks(vocab: int) -> None:
    """In part from flat logits, where noise alone decides."""
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 4, 40).unsqueeze(1)
    temperatures = [0.0, 0.7, 1.0, 3.0] * 10
    keys = noise_keys(list(range(40)), [3] * 40)
    assert torch.equal(cuda_pick(logits, temperatures, keys), pick(logits, temperatures, keys))


def test_what_is_no_number_is_not_picked() -> None:
    """Nor a token behind the last, where all are none."""
    logits = torch.full((2, 5000), torch.nan)
    logits[0, 4500] = -3.0
    assert cuda_pick(logits, [0.0, 1.0], noise_keys([1, 2], [0, 0])).tolist() == [4500, 0]


def test_of_equals_the_first_is_picked() -> None:
    logits = torch.zeros(2, 9000)
    logits[0, [4095, 4096, 8999]] = 1.0
    assert cuda_pick(logits, [0.0, 0.0], np.zeros((2, 2), np.int32)).tolist() == [4095, 0]
