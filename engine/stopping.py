"""When a sequence ends: pure functions of what it has so far."""

from __future__ import annotations

from typing import NamedTuple

from tailserve.engine.types import FinishReason, SamplingParams


class Stop(NamedTuple):
    reason: FinishReason
    detail: int | str | None = None


def check_stop(token_id: int, num_output: int, num_tokens: int, params: SamplingParams, max_model_len: int) -> Stop | None:
    """Whether a sequence ends with `token_id`, its `num_output`-th output token of `num_tokens` in all.

    Stop tokens win over lengths, so that an answer whose last allowed token ends it counts as complete.
    """
    if num_output >= params.min_tokens:
        if token_id in params.eos_token_ids:
            return Stop(FinishReason.STOP)
        if token_id in params.stop_token_ids:
            return Stop(FinishReason.STOP, token_id)
    if num_output >= params.max_tokens or num_tokens >= max_model_len:
        return Stop(FinishReason.LENGTH)
    return None


def may_have_prefix(params: SamplingParams) -> bool:
    """Whether a draft may write an answer's first tokens alone: it knows neither penalties nor the verifier's logprobs."""
    penalties = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return params.logprobs is None and not penalties and params.min_tokens == 0
