"""What transformers itself answers."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM


def greedy_answers(path: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """`generate`'s greedy tokens in float32, `num_tokens` of each: the end of a sequence is ignored."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers = []
    for ids in prompts:
        mask = torch.ones(1, len(ids))
        out = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
        answers.append(out[0, len(ids) :].tolist())
    return answers
