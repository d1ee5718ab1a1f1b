"""A draft head in the manner of EAGLE: one decoder layer that is given the verifier's hidden states.

After EAGLE-3 (Li et al., arXiv 2503.01840): hidden states of several of the verifier's layers are fused into one state per
token; the layer reads it beside the embedding of the token that followed, and says what comes next. When it goes on from its
own guess, its own output takes the state's place. Embedding and head are the verifier's, the latter for the draft's few
thousand tokens only. As in the first EAGLE (arXiv 2401.15077) the embedding also enters the layer's residual stream: through
attention's values alone little of it gets past a small verifier's few KV heads.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tailserve.engine.errors import ConfigError
from tailserve.engine.options import EAGLE_MODEL_TYPE


class EagleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes; written as config.json beside the weights."""

    model_type: str = EAGLE_MODEL_TYPE
    hidden_size: int
    """The verifier's."""
    vocab_size: int
    """The verifier's."""
    num_verifier_layers: int
    feature_layers: tuple[int, ...]
    """Verifier layers, counted from 0, whose output is read. The last one is among them, last."""
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    draft_vocab_size: int
    """Tokens that can be drafted."""


class EagleHead(nn.Module):
    """The trained part. C is the hidden size, F the number of feature layers."""

    frequencies: torch.Tensor
    draft_tokens: torch.Tensor
    """[draft_vocab_size] int64: the verifier's ids of the tokens that can be drafted."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        size, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.fuse = nn.Linear(len(config.feature_layers) * size, size, bias=False)
        self.token_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.state_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.qkv = nn.Linear(2 * size, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.mix = nn.Linear(2 * size, size, bias=False)
        self.output = nn.Linear(heads * head_dim, size, bias=False)
        self.post_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.gate_up = nn.Linear(size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, size, bias=False)
        self.final_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.register_buffer("draft_tokens", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        frequencies = config.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def check_fits(self, hidden_size: int, vocab_size: int, num_layers: int) -> None:
        """ConfigError if the head was made for a verifier of another shape."""
        config = self.config
        made_for = (config.hidden_size, config.vocab_size, config.num_verifier_layers)
        if made_for != (hidden_size, vocab_size, num_layers):
            raise ConfigError(
                f"the draft was made for a verifier of hidden size, vocabulary and layers {made_for}, this one has "
                f"{(hidden_size, vocab_size, num_layers)}: make one for it with `tailserve distill`",
                param="draft_model",
            )

    def states(self, features: torch.Tensor) -> torch.Tensor:
        """One state [..., C] for each token's hidden states [..., F * C], each layer's brought to the same scale first."""
        fused: torch.Tensor = self.fuse(level(features, self.config).to(self.token_norm.weight.dtype))
        return fused

    def project(
        self, embeddings: torch.Tensor, states: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [..., T, heads, head_dim], keys and values [..., T, kv_heads, head_dim], rotated by positions [T], and the
        residual stream [..., T, C].

        `embeddings` [..., T, C] are of the tokens behind those that `states` [..., T, C] belong to.
        """
        config = self.config
        joined = torch.cat([self.token_norm(embeddings), self.state_norm(states)], -1)
        heads = self.qkv(joined).unflatten(-1, (-1, config.head_dim))
        query, key, value = heads.split(
            [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads], -2
        )
        angles = positions.unsqueeze(-1).float() * self.frequencies
        cosines, sines = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
        return _rotate(query, cosines, sines), _rotate(key, cosines, sines), value, states + self.mix(joined)

    def finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., T, C], given attention's [..., T, heads * head_dim]."""
        states = residual + self.output(attended)
        gate, up = self.gate_up(self.post_norm(states)).chunk(2, -1)
        result: torch.Tensor = states + self.down(nn.functional.silu(gate) * up)
        return result

    def logits(self, states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Scores [..., draft_vocab_size] of the draft's tokens; `head` are their rows of the verifier's."""
        return nn.functional.linear(self.final_norm(states), head)

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors, weights in bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in self.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(self.config), indent=2) + b"\n")


def level(features: torch.Tensor, config: EagleConfig) -> torch.Tensor:
    """A token's hidden states [..., F * C], each layer's at the same scale, in float32."""
    parts = features.view(*features.shape[:-1], -1, config.hidden_size).float()
    return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + config.rms_norm_eps)).flatten(-2)


def load_eagle(folder: Path) -> EagleHead:
    """Reads what `EagleHead.save` wrote. ConfigError if it is something else."""
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=EagleConfig)
        head = EagleHead(config)
        head.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, msgspec.DecodeError, RuntimeError) as error:
        raise ConfigError(f"{folder} holds no EAGLE draft: {error}", param="draft_model") from error
    return head.requires_grad_(False)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1).to(x.dtype)
