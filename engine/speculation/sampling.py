"""From logits to tokens: the verifier's distribution, counter-based noise, and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tailserve.engine.types import SamplingParams, TokenLogprob

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SamplingPoint:
    """One row of logits to draw from."""

    params: SamplingParams
    position: int
    """Index of the drawn token in its sequence, prompt included."""
    num_output: int
    """Output tokens before it."""


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in the open interval (0, 1) for each (seed, position), and nothing else.

    SplitMix64 (Steele et al. 2014) over the seed, then over the mixed seed plus the position, so that neighbouring seeds
    and positions share nothing. The half added to 53 random bits keeps 0 and 1 out.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix64(np.asarray(seeds, np.uint64))
        bits = _splitmix64(mixed ^ (np.asarray(positions, np.uint64) * _GOLDEN))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def apply_penalties(
    logits: torch.Tensor, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> None:
    """Changes one float32 row of logits [vocab] in place, given the tokens before it.

    Repetition divides positive and multiplies negative logits of every token seen (Keskar et al. 2019); presence and
    frequency subtract from tokens of the output, as in OpenAI's API.
    """
    vocab = logits.shape[-1]
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}), device=logits.device)
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(list(output_ids), device=logits.device), minlength=vocab)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def has_penalties(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def mask_early_stops(logits: torch.Tensor, points: Sequence[SamplingPoint]) -> None:
    """Takes stop tokens out of float32 logits [points, vocab], in place, where `min_tokens` is not reached."""
    for index, point in enumerate(points):
        stops = point.params.eos_token_ids + point.params.stop_token_ids
        if stops and point.num_output < point.params.min_tokens:
            logits[index, list(stops)] = -torch.inf


def distribution(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities [rows, vocab], float32, that rows of float32 logits with positive temperatures are drawn from."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(-1)

    logits = logits / column([p.temperature for p in params])
    top_k = [p.top_k for p in params]
    if any(top_k):
        vocab = logits.shape[-1]
        kept = [min(k, vocab) if k > 0 else vocab for k in top_k]
        best = logits.topk(max(k for k in kept), dim=-1).values
        floor = best.gather(-1, torch.tensor(kept, device=logits.device).unsqueeze(-1) - 1)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    probs = logits.softmax(-1)
    if any(p.top_p < 1.0 for p in params):
        # The smallest set of most likely tokens whose probability reaches top_p; the most likely one always stays.
        order = probs.sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        # Rounding lets the sum pass 1 before the last token: rows without a limit must not notice.
        limits = column([p.top_p if p.top_p < 1.0 else torch.inf for p in params])
        drop = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order.indices, before >= limits)
        drop &= probs < probs.max(-1, keepdim=True).values
        probs = probs.masked_fill(drop, 0.0)
    if any(p.min_p > 0.0 for p in params):
        floor = column([p.min_p for p in params]) * probs.max(-1, keepdim=True).values
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: torch.Tensor, noise: npt.NDArray[np.float64]) -> torch.Tensor:
    """Token ids [rows] by inverse transform, in order of token id.

    Token order, not order of likelihood: rounding that swaps two tokens of nearly equal probability then moves a boundary
    by an ulp instead of exchanging their intervals. Summed in float64 for the same reason.
    """
    cdf = probs.double().cumsum(-1)
    target = torch.from_numpy(noise).to(cdf.device).unsqueeze(-1) * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    # Rounding may put the target at the very end, behind the last token that has any probability.
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)


def sample(logits: torch.Tensor, points: Sequence[SamplingPoint]) -> list[int]:
    """One token for each row of float32 logits [points, vocab]; penalties have been applied. Changes `logits`."""
    mask_early_stops(logits, points)
    tokens = logits.argmax(-1)
    random = [i for i, point in enumerate(points) if point.params.temperature > 0]
    if random:
        chosen = [points[i] for i in random]
        probs = distribution(logits[random], [point.params for point in chosen])
        noise = uniforms([point.params.seed for point in chosen], [point.position for point in chosen])
        tokens[random] = draw(probs, noise)
    result: list[int] = tokens.tolist()
    return result


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log probabilities under float32 logits [rows, vocab] of the tokens chosen there, with the `num_top` best."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device).unsqueeze(-1)).squeeze(-1).tolist()
    best = logprobs.topk(num_top, dim=-1) if num_top else None
    entries = []
    for row, token_id in enumerate(token_ids):
        top = tuple(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)) if best else ()
        entries.append(TokenLogprob(token_id, chosen[row], top))
    return entries
