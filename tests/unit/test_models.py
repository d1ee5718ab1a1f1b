"""transformers models through the paged path, against the same models as transformers runs them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packed import run_in_chunks
from tiny import TINY, save_model

from tailserve.engine.errors import ConfigError, UnsupportedModelError
from tailserve.engine.model.loading import load_model
from tailserve.engine.options import LoadOptions

WINDOW = 24
SUPPORTED = {
    "llama": transformers.LlamaConfig(**TINY),
    "gemma2": transformers.Gemma2Config(**TINY, head_dim=16, sliding_window=WINDOW),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=WINDOW),
    "qwen2": transformers.Qwen2Config(**TINY),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=16),
    "phi3": transformers.Phi3Config(**TINY),
    "gemma3": transformers.Gemma3TextConfig(**TINY, head_dim=16, sliding_window=WINDOW),
}
REFUSED = {
    "hybrid": (
        transformers.Qwen3NextConfig(**(TINY | {"num_hidden_layers": 4}), head_dim=16, num_experts=4, num_experts_per_tok=2),
        "linear_attention",
    ),
    "mla": (
        transformers.DeepseekV3Config(**TINY, n_routed_experts=8, n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16),
        "multi-head latent attention",
    ),
    "dynamic rope": (
        transformers.LlamaConfig(
            **TINY,
            rope_parameters={
                "rope_type": "dynamic",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 128,
            },
        ),
        "max_model_len to 128",
    ),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_packed_batches_agree_with_eager(kind: str, backend: str, tmp_path: Path) -> None:
    path = save_model(SUPPORTED[kind], tmp_path)
    # Loading runs the self-check; this goes further: real windows, three sequences, odd chunks, shuffled blocks.
    paged, _ = load_model(LoadOptions(path=path, dtype="float32", attention_backend=backend, block_size=8, num_blocks=64))
    eager = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for tokens, logits in run_in_chunks(paged, 96):
        with torch.no_grad():
            expected = eager(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_bfloat16_passes_its_self_check(kind: str, tmp_path: Path) -> None:
    path = save_model(SUPPORTED[kind], tmp_path)
    _, info = load_model(LoadOptions(path=path, dtype="bfloat16"))
    assert info.attention_backend == "cpu"


def test_float16_on_a_cpu_takes_the_reference_backend(tiny_llama: str) -> None:
    _, info = load_model(LoadOptions(path=tiny_llama, dtype="float16", device="cpu"))
    assert info.attention_backend == "reference"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_packed_batches_would_get_wrong_is_refused(kind: str, tmp_path: Path) -> None:
    config, reason = REFUSED[kind]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_model(LoadOptions(path=str(tmp_path)))


def test_a_window_that_a_backend_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailserve.engine.model import attention

    path = save_model(SUPPORTED["mistral"], tmp_path)
    options = attention.Options

    def forgetful(scaling: float, sliding_window: int | None, *rest: Any) -> attention.Options:
        return options(scaling, None, *rest)

    monkeypatch.setattr(attention, "Options", forgetful)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UnsupportedModelError, match="off by"):
            load_model(LoadOptions(path=path, dtype=dtype))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"max_model_len": 100_000}, "max_model_len"),
        ({"attention_backend": "magic"}, "attention_backend"),
        ({"attention_backend": "cpu", "dtype": "float16"}, "attention_backend"),
    ],
)
def test_options_that_cannot_work_name_themselves(tiny_llama: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(LoadOptions(path=tiny_llama, **fields))
    assert caught.value.param == param
