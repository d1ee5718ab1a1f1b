"""From logits to tokens: the verifier's distribution, counter-based noise, and log probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int32]:
    """Two keys of 32 bits [rows, 2] for each seed and position, by SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = _splitmix64(np.asarray(seeds, np.uint64))
        keys = _splitmix64(mixed ^ (np.asarray(positions, np.uint64) * _GOLDEN))
    return keys.view(np.int32).reshape(-1, 2)


def exponentials(keys: npt.NDArray[np.int32], vocab: int, device: torch.device) -> torch.Tensor:
    """Standard exponential noise [rows, vocab], float32: a function of (seed, position, token) and nothing else.

    Two rounds of the lowbias32 hash (Wellons 2018) mix the keys of seed and position with each token. 23 bits make a uniform
    number whose half step keeps 0 and 1 out.
    """
    halves = torch.from_numpy(keys).to(device)
    bits = torch.arange(vocab, dtype=torch.int32, device=device) ^ halves[:, :1]
    _mix32(bits)
    bits ^= halves[:, 1:]
    _mix32(bits)
    uniform = (((bits >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23
    return uniform.log_().neg_()


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix32(bits: torch.Tensor) -> None:
    """lowbias32, in place. int32 multiplication wraps; the masks make its arithmetic shifts logical ones."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x846CA68B - (1 << 32)
    bits ^= (bits >> 16) & 0xFFFF


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


def pick(logits: torch.Tensor, temperatures: Sequence[float], keys: npt.NDArray[np.int32]) -> torch.Tensor:
    """Token ids [rows] drawn from float32 logits [rows, vocab]; temperature 0 takes the most likely, the first of equals.

    Each token's exponential clock runs at the rate of its probability, and the first to ring wins (the Gumbel-max trick).
    Rounding in another batch shape changes the winner only where two clocks ring within that rounding of each other; with
    inverse transform sampling it would move every boundary of a cumulative sum over the vocabulary, and answers would depend
    on the batch every few hundred tokens.
    """
    random = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    tokens = logits.argmax(-1)
    if random:
        scale = torch.tensor([temperatures[row] for row in random], dtype=torch.float32, device=logits.device).unsqueeze(-1)
        noise = exponentials(keys[random], logits.shape[-1], logits.device)
        tokens[random] = (logits[random] / scale - noise.log_()).argmax(-1)
    return tokens


def _truncates(params: SamplingParams) -> bool:
    return params.temperature > 0 and bool(params.top_k or params.top_p < 1.0 or params.min_p > 0.0)


def sample(
    logits: torch.Tensor,
    points: Sequence[SamplingPoint],
    pick: Callable[[torch.Tensor, Sequence[float], npt.NDArray[np.int32]], torch.Tensor] = pick,
) -> list[int]:
    """One token for each row of float32 logits [points, vocab]; penalties have been applied. Changes `logits`."""
    mask_early_stops(logits, points)
    temperatures = [point.params.temperature for point in points]
    truncated = [row for row, point in enumerate(points) if _truncates(point.params)]
    if truncated:
        logits[truncated] = distribution(logits[truncated], [points[row].params for row in truncated]).log_()
        for row in truncated:
            temperatures[row] = 1.0
    keys = noise_keys([point.params.seed for point in points], [point.position for point in points])
    result: list[int] = pick(logits, temperatures, keys).tolist()
    return result


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int, end_ids: Sequence[int] = ()
) -> list[TokenLogprob]:
    """Log probabilities under float32 logits [rows, vocab] of the tokens chosen there, with the `num_top` best, and of
    `end_ids` together if there are any."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device).unsqueeze(-1)).squeeze(-1).tolist()
    best = logprobs.topk(num_top, dim=-1) if num_top else None
    ends = logprobs[:, list(end_ids)].logsumexp(-1).tolist() if end_ids else [None] * len(token_ids)
    entries = []
    for row, token_id in enumerate(token_ids):
        top = tuple(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)) if best else ()
        entries.append(TokenLogprob(token_id, chosen[row], top, ends[row]))
    return entries
