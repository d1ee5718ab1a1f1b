"""Models built like Llama, and others, that are small and random."""

from __future__ import annotations

from typing import Any

import transformers
from tiny import TINY

WIDE: dict[str, Any] = TINY | {"hidden_size": 128, "vocab_size": 100}
"""Heads of 32 dimensions, and a vocabulary that does not fill its last panel."""
FITTING = {
    "llama": transformers.LlamaConfig(**WIDE),
    "llama, tied, one KV head": transformers.LlamaConfig(**(WIDE | {"num_key_value_heads": 1}), tie_word_embeddings=True),
    "llama, 40 heads for one of keys": transformers.LlamaConfig(
        **(WIDE | {"hidden_size": 640, "num_attention_heads": 40, "num_key_value_heads": 1, "initializer_range": 0.05}),
        head_dim=32,
    ),
    "llama, wider than its heads": transformers.LlamaConfig(
        **(WIDE | {"hidden_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1}), head_dim=32
    ),
    "mistral": transformers.MistralConfig(**WIDE, sliding_window=24),
    "qwen2": transformers.Qwen2Config(**WIDE),
    "qwen3": transformers.Qwen3Config(**WIDE, head_dim=64),
    "yarn": transformers.LlamaConfig(**WIDE, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
}
OTHERS = {
    "another structure": transformers.Gemma2Config(**WIDE, head_dim=32, sliding_window=24),
    "a multiplier that modules do not show": transformers.GraniteConfig(**WIDE, residual_multiplier=0.3),
    "queries scaled by position": transformers.Ministral3Config(
        **WIDE,
        head_dim=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "narrow heads": transformers.LlamaConfig(**TINY),
}
