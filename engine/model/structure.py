"""Which models are built like Llama, so that something faster than their own modules can run them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}


def like_llama(model: PreTrainedModel) -> bool:
    """Whether the model's modules are those of Llama and its kin: Llama, Mistral, Qwen 2 and 3, SmolLM and more.

    What modules do not show (a multiplier, say) shows when answers are compared, if it shows in short sequences.
    """
    if (getattr(model.config, "rope_parameters", None) or {}).get("llama_4_scaling_beta"):
        # Queries of late positions are scaled, as in Ministral 3.
        return False
    body: Any = getattr(model, "model", None)
    if _children(model) != {"model", "lm_head"} or _children(body) != _BODY:
        return False
    if model.lm_head.bias is not None or not hasattr(body.norm, "variance_epsilon"):
        return False
    return all(_layer_fits(layer) for layer in body.layers) and len({sliding_window(y.self_attn) for y in body.layers}) == 1


def _layer_fits(layer: Any) -> bool:
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP or not _children(layer.self_attn) >= _ATTENTION:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = _children(attention) - _ATTENTION
    plain = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        head_norms in (set(), _HEAD_NORMS)
        and all(len(getattr(attention, name).weight) == attention.head_dim for name in head_norms)
        and all(type(linear) is nn.Linear for linear in (attention.q_proj, attention.k_proj, attention.v_proj, *plain))
        and all(linear.bias is None for linear in plain)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(hasattr(norm, "variance_epsilon") for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def sliding_window(attention: Any) -> int | None:
    """Positions that a query sees, itself included. Some modules hold it, others read their configuration in each call."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window
