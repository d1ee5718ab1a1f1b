"""Whether sampled answers follow a model's distribution exactly, with any draft and rule of verification."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import torch
import transformers
from fakes import NORMAL, make_request, run_to_end
from local import Models
from msgspec.structs import replace
from tiny import TINY, save_model

RULES: list[tuple[str | float, str]] = [
    ("none", "one_hot"),
    (0.3, "one_hot"),
    (0.3, "branches"),
    (0.3, "token"),
    (0.3, "block"),
]
"""Draft, and how it is verified; with branches, by the first rule. Without chance in a draft (n-grams, say) answers are
compared token by token elsewhere."""


LENGTH, JUDGED = 5, 3
"""Tokens of an answer, and how many of its last are judged: a draft and what follows when it ends early are before them."""


def check_answers(
    folder: Path, draft: str | float, rule: str, *, in_flight: int, seeds: int, speculation: int | str = 3
) -> None:
    """Many seeds on a model of 6 tokens, against the probabilities of all 216 ends that an answer may have.

    The statistic is chi-square over answers expected at least 5 times, the others pooled. Its threshold is the value that
    a correct sampler exceeds for one choice of seeds in 100,000; the seeds are fixed, so there is no false alarm in CI.
    """
    config = transformers.LlamaConfig(**(TINY | {"vocab_size": 6, "pad_token_id": None}))
    models = Models(save_model(config, folder), num_blocks=400, block_size=8, max_model_len=32)
    prompt, count = [3, 1, 3, 1], seeds
    fields = {"temperature": 1.3, "top_k": 5, "top_p": 0.95}
    exact = _exact(models, prompt, temperature=1.3, top_k=5, top_p=0.95)
    engine = models.engine(
        draft,
        max_num_seqs=in_flight,
        sampled_drafts=rule in ("token", "block"),
        block=rule == "block",
        draft_branches=3 if rule == "branches" else 1,
        classes=(replace(NORMAL, speculation=speculation),),
    )
    for seed in range(seeds):
        engine.add(make_request(prompt, id=str(seed), seed=seed, max_tokens=LENGTH, **fields))
    seen = Counter(tuple(tokens[-JUDGED:]) for tokens in run_to_end(engine, max_steps=6 * seeds).tokens.values())
    assert set(seen) <= set(exact)
    common = {answer: p * count for answer, p in exact.items() if p * count >= 5}
    rest = count - sum(common.values())
    statistic = sum((seen[answer] - mean) ** 2 / mean for answer, mean in common.items())
    statistic += (sum(seen.values()) - sum(seen[a] for a in common) - rest) ** 2 / max(rest, 1e-9)
    freedom = len(common)
    # Wilson and Hilferty's approximation of the chi-square quantile at 1 - 1e-5 (4.265 normal deviations).
    threshold = freedom * (1 - 2 / (9 * freedom) + 4.265 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < threshold
    if draft != "none":
        assert engine.stats.accepted_draft_tokens > 0


def _exact(
    models: Models, prompt: list[int], *, temperature: float, top_k: int, top_p: float
) -> dict[tuple[int, ...], float]:
    """Probability of each end that an answer may have, from transformers' own logits and a sort."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(models.path, dtype=torch.float32)

    def distribution(logits: torch.Tensor) -> list[float]:
        probs = (logits / temperature).softmax(-1).tolist()
        ranked = sorted(range(6), key=lambda token: -probs[token])[:top_k]
        total = sum(probs[token] for token in ranked)
        kept, mass = [], 0.0
        for token in ranked:
            if mass >= top_p * total:
                break
            kept.append(token)
            mass += probs[token]
        return [probs[token] / mass if token in kept else 0.0 for token in range(6)]

    begun: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = oracle(torch.tensor([[*prompt, *tokens] for tokens in begun])).logits[:, -1]
        begun = {
            (*tokens, token): probability * share
            for (tokens, probability), row in zip(begun.items(), logits, strict=True)
            for token, share in enumerate(distribution(row))
            if share > 0
        }
    ends: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens, probability in begun.items():
        ends[tokens[-JUDGED:]] += probability
    return ends
