"""Takes a transformers model built like Llama apart, into the arrays that the compiled decoder runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from tailserve.engine.model.int8 import PAIR, ZERO, Panels
from tailserve.engine.model.layer import Array, LayerVectors, LayerWeights
from tailserve.engine.model.memory import aligned
from tailserve.engine.model.microkernel import LANES
from tailserve.engine.model.structure import like_llama
from tailserve.engine.model.tiles import COLUMNS

_KINDS: dict[int, npt.DTypeLike] = {1: np.float32, 2: np.uint16, PAIR: np.uint8}
"""How many numbers are 4 bytes, to what they are in."""


class EndWeights(NamedTuple):
    """Before and behind the layers."""

    embedding: Array
    """Panels: the head's themselves where the two are tied, and not quantized."""
    input_norm: Array
    """float32 [layers, H]"""
    final_norm: Array
    """float32 [H]"""


class DecoderWeights(NamedTuple):
    """A whole model's."""

    ends: EndWeights
    layers: LayerWeights
    head: Panels


def fits(model: PreTrainedModel) -> bool:
    """Whether a model is built like Llama (see `structure.like_llama`), in sizes that fill vectors and panels."""
    if not like_llama(model):
        return False
    body: Any = model.model
    # Half of the rotated dimensions at a time, in whole vectors.
    if len(body.rotary_emb.inv_freq) % LANES:
        return False
    return all(
        size % COLUMNS == 0
        for layer in body.layers
        for size in (layer.self_attn.head_dim, layer.mlp.gate_proj.out_features, layer.self_attn.q_proj.in_features)
    )


def read_weights(model: PreTrainedModel, positions: int, *, int8: bool) -> DecoderWeights:
    """Packs the weights of a model that `fits`; rotary angles are for so many positions. `int8` quantizes all products."""
    body: Any = model.model
    layers, attentions, mlps = body.layers, [y.self_attn for y in body.layers], [y.mlp for y in body.layers]
    pair = 2 if model.dtype == torch.bfloat16 else 1
    probe = torch.zeros(1, dtype=torch.float32, device=model.device)
    cosines, sines = body.rotary_emb(probe, torch.arange(positions, device=model.device).unsqueeze(0))

    def panels(weights: list[torch.Tensor]) -> Panels:
        return make_panels(weights, pair, int8=int8)

    head = panels([model.lm_head.weight])
    tied = body.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()

    def vectors(read: Callable[[Any], list[torch.Tensor | None]], owners: list[Any]) -> Array:
        rows = [[part for part in read(owner) if part is not None] for owner in owners]
        return np.stack([torch.cat(row).float().numpy() if row else np.empty(0, np.float32) for row in rows])

    return DecoderWeights(
        ends=EndWeights(
            embedding=head.data if tied and not int8 else float_panels([body.embed_tokens.weight], pair),
            input_norm=vectors(lambda y: [y.input_layernorm.weight], layers),
            final_norm=body.norm.weight.float().numpy(),
        ),
        layers=LayerWeights(
            qkv=panels([torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) for a in attentions]),
            output=panels([a.o_proj.weight for a in attentions]),
            gate_up=panels([interleave(m.gate_proj.weight, m.up_proj.weight) for m in mlps]),
            down=panels([m.down_proj.weight for m in mlps]),
            vectors=LayerVectors(
                qkv_bias=vectors(lambda a: [a.q_proj.bias, a.k_proj.bias, a.v_proj.bias], attentions),
                query_norm=vectors(lambda a: [a.q_norm.weight] if hasattr(a, "q_norm") else [], attentions),
                key_norm=vectors(lambda a: [a.k_norm.weight] if hasattr(a, "k_norm") else [], attentions),
                post_norm=vectors(lambda y: [y.post_attention_layernorm.weight], layers),
                cosines=cosines[0].numpy(),
                sines=sines[0].numpy(),
            ),
        ),
        head=head,
    )


def make_panels(weights: list[torch.Tensor], pair: int, *, int8: bool) -> Panels:
    """Weights [N, K] of each layer, `pair` numbers to 4 bytes, or as integers."""
    if int8:
        return integer_panels(weights)
    return Panels(float_panels(weights, pair), np.empty((len(weights), 0), np.float32))


def float_panels(weights: list[torch.Tensor], pair: int) -> Array:
    """Weights [N, K] of each layer as panels; columns that fill the last panel up are 0."""
    columns, depth = weights[0].shape
    count = -(-columns // COLUMNS)
    out = aligned((len(weights), count, depth // pair, COLUMNS * pair), _KINDS[pair])
    for layer, weight in enumerate(weights):
        padded = nn.functional.pad(weight, (0, 0, 0, count * COLUMNS - columns))
        packed = padded.view(count, COLUMNS, depth // pair, pair).transpose(1, 2).reshape(out.shape[1:])
        out[layer] = packed.view(torch.uint16).numpy() if pair == 2 else packed.numpy()
    return out


def integer_panels(weights: list[torch.Tensor]) -> Panels:
    """Weights [N, K] of each layer as panels of integers, each column by its own largest."""
    scales = [weight.float().abs().amax(1).clamp(min=1e-12) / 127 for weight in weights]
    integers = [
        (weight.float() / scale.unsqueeze(1)).round().add(ZERO).to(torch.uint8)
        for weight, scale in zip(weights, scales, strict=True)
    ]
    filling = -len(scales[0]) % COLUMNS
    return Panels(
        float_panels(integers, PAIR), torch.stack([nn.functional.pad(scale, (0, filling)) for scale in scales]).numpy()
    )


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    parts = [weight.view(-1, COLUMNS, weight.shape[1]) for weight in (gate, up)]
    return torch.stack(parts, 1).reshape(-1, gate.shape[1])
