"""A transformers model small enough to run in milliseconds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Wide enough that answers vary and near-ties are rare.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(config: object, directory: Path, *, seed: int = 0) -> str:
    """Writes a random model of a transformers configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


def save_tiny(directory: Path) -> str:
    """A random model that is quick, with the demo model's tokenizer; where it is."""
    from transformers import LlamaConfig

    from tailserve.deployments.models import resolve_model

    path = save_model(LlamaConfig(**(TINY | {"vocab_size": 49152, "max_position_embeddings": 1024})), directory)
    shutil.copy(resolve_model(None) / "tokenizer.json", directory)
    return path


def by_transformers(model: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """What transformers' own `generate` answers, greedily and without an end."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    oracle.generation_config.eos_token_id = None
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        tokens = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
        texts.append(tokenizer.decode(tokens[0, ids.shape[1] :].tolist()))
    return texts
