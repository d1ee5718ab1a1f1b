"""Models built like Llama on CUDA: what lies between their products runs in single kernels, products that share their input
as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import nn
from transformers import PreTrainedModel

from tailserve.engine.errors import UnsupportedModelError
from tailserve.engine.model.attention import AttentionBackend, KVCache, Options, PagedContext
from tailserve.engine.model.fused_kernels import add_norm, gate, split_heads
from tailserve.engine.model.graphs import GraphedModel
from tailserve.engine.model.selfcheck import check_packed
from tailserve.engine.model.structure import like_llama, sliding_window

logger = logging.getLogger(__name__)

HEADS_AT_ONCE = 16
COLUMNS_AT_ONCE = 1024


class _Layer(NamedTuple):
    input_norm: torch.Tensor
    qkv: torch.Tensor
    """[K, N], as all weights of products here."""
    qkv_bias: torch.Tensor | None
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    """Of queries and of keys."""
    output: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def graphed_model(
    model: PreTrainedModel,
    cache: KVCache,
    backend: AttentionBackend,
    expected: list[torch.Tensor],
    *,
    max_model_len: int,
    whole: bool,
) -> GraphedModel:
    """The fastest `GraphedModel` that answers as `expected` (see `selfcheck`). UnsupportedModelError if none does.

    `whole`: all of the model is on this device.
    """
    if whole and can_fuse(model):
        fused = FusedModel(model, cache, backend, max_model_len=max_model_len)
        try:
            check_packed(fused, model, expected)
        except UnsupportedModelError as error:
            logger.info("kernels for Llama's layers do not fit this model, so its own modules run it: %s", error.message)
        else:
            return fused
    plain = GraphedModel(model, cache, backend, max_model_len=max_model_len)
    check_packed(plain, model, expected)
    return plain


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether `FusedModel` may take this model; whether it answers alike shows when answers are compared."""
    body: Any = getattr(model, "model", None)
    return (
        like_llama(model)
        and 2 * len(body.rotary_emb.inv_freq) == body.layers[0].self_attn.head_dim
        and len({weight.dtype for weight in model.parameters()}) == 1
        and all(len({linear.bias is None for linear in _heads(layer.self_attn)}) == 1 for layer in body.layers)
    )


class FusedModel(GraphedModel):
    """A `GraphedModel` of a model that one can fuse. Its modules go on to work: they share the memory of their weights.

    The residual stream is float32, and so are logits.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, max_model_len: int) -> None:
        super().__init__(model, *args, max_model_len=max_model_len)
        body: Any = model.model
        attention = body.layers[0].self_attn
        self._kv_heads = attention.k_proj.out_features // attention.head_dim
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._epsilon: float = body.norm.variance_epsilon
        self.sliding_window = sliding_window(attention)
        self._embedding: torch.Tensor = body.embed_tokens.weight
        self._final_norm: torch.Tensor = body.norm.weight
        self._head: torch.Tensor = model.lm_head.weight.T
        self._layers = [_share_weights(layer) for layer in body.layers]
        # What the weights took apart is for others now.
        torch.cuda.empty_cache()
        probe = torch.zeros(1, dtype=torch.float32, device=model.device)
        angles = body.rotary_emb(probe, torch.arange(max_model_len, device=model.device).unsqueeze(0))
        self._cosines, self._sines = (part[0, :, : self._head_dim // 2].contiguous() for part in angles)

    def _logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor, paged: PagedContext
    ) -> torch.Tensor:
        hidden = nn.functional.embedding(token_ids, self._embedding).float()
        options = Options(self._scaling, self.sliding_window)
        delta: torch.Tensor | None = None
        for number, layer in enumerate(self._layers):
            normed = self._norm(hidden, delta, layer.input_norm)
            query = self._make_heads(number, layer, normed, positions, paged)
            attended = self._backend.attend(query, paged.cache, number, paged.sequences, options)
            delta = attended.flatten(1) @ layer.output
            normed = self._norm(hidden, delta, layer.post_norm)
            delta = _gated(normed @ layer.gate_up) @ layer.down
            # No module of a layer runs here, so no hook does.
            if number in self._tapped:
                self._tapped[number] = hidden + delta
        self._gather_features()
        if not len(wanted):
            return hidden.new_empty((0, self._head.shape[1]))
        normed = self._norm(hidden, delta, self._final_norm, wanted)
        if normed.dtype == torch.float32:
            return normed @ self._head
        return torch.mm(normed, self._head, out_dtype=torch.float32)

    def _norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        count, size = len(hidden if rows is None else rows), hidden.shape[1]
        out = weight.new_empty((count, size))
        add_norm[(count,)](
            hidden, hidden if delta is None else delta, weight, out if rows is None else rows, out, self._epsilon,
            SIZE=size, WIDTH=triton.next_power_of_2(size), HAS_DELTA=delta is not None, PICKS=rows is not None,
        )  # fmt: skip
        return out

    def _make_heads(
        self, number: int, layer: _Layer, normed: torch.Tensor, positions: torch.Tensor, paged: PagedContext
    ) -> torch.Tensor:
        """Queries [T, heads, head_dim]. Keys and values go into the cache."""
        cache = paged.cache
        qkv = normed @ layer.qkv if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, normed, layer.qkv)
        tokens, width = qkv.shape
        all_heads = width // self._head_dim
        heads = all_heads - 2 * self._kv_heads
        query = qkv.new_empty((tokens, heads, self._head_dim))
        query_norm, key_norm = layer.head_norms or (qkv, qkv)
        split_heads[(tokens, triton.cdiv(all_heads, HEADS_AT_ONCE))](
            qkv, query_norm, key_norm, self._cosines, self._sines, positions, paged.sequences.slots, query,
            cache.keys[number], cache.values[number], self._epsilon,
            HEADS=heads, KV_HEADS=self._kv_heads, HEAD_DIM=self._head_dim, BLOCK_SIZE=cache.block_size,
            AT_ONCE=HEADS_AT_ONCE, WIDTH=triton.next_power_of_2(self._head_dim // 2),
            HAS_NORMS=layer.head_norms is not None,
        )  # fmt: skip
        return query


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, size))
    gate[(tokens, triton.cdiv(size, COLUMNS_AT_ONCE))](gate_up, out, SIZE=size, AT_ONCE=COLUMNS_AT_ONCE)
    return out


def _heads(attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _share_weights(layer: Any) -> _Layer:
    """A layer's weights, in memory that its modules use from now on, too."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = _heads(attention)
    norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_join(heads),
        qkv_bias=None if attention.q_proj.bias is None else torch.cat([linear.bias for linear in heads]),
        head_norms=norms,
        output=attention.o_proj.weight.T,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_join((mlp.gate_proj, mlp.up_proj)),
        down=mlp.down_proj.weight.T,
    )


def _join(linears: Sequence[nn.Linear]) -> torch.Tensor:
    """Weights [K, N] of all, side by side; each module has its part of that memory from now on."""
    joined = torch.cat([linear.weight for linear in linears])
    end = 0
    for linear in linears:
        begin, end = end, end + linear.out_features
        linear.weight = nn.Parameter(joined[begin:end], requires_grad=False)
    return joined.T
