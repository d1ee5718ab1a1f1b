"""The data that crosses process boundaries. Everything here is immutable and encodes with msgspec."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

import msgspec


class FinishReason(StrEnum):
    """Why a request ended. Every request that enters the engine gets exactly one."""

    STOP = "stop"
    """A stop token; `TokenChunk.stop_reason` names it unless it was the model's own end-of-sequence token."""
    LENGTH = "length"
    """`max_tokens`, the context length, or the request's deadline (`stop_reason` is then "deadline")."""
    ABORT = "abort"
    """The client left or asked for it."""
    ERROR = "error"
    """It could not be completed; `TokenChunk.error` says why."""
    LOST = "lost"
    """Its instance cannot go on, and another can: the ingress carries it on there. No client sees this one."""


class SloClass(msgspec.Struct, frozen=True, kw_only=True):
    """A service-level class: data from the configuration, not an enumeration."""

    name: str
    priority: int
    """Lower is more urgent. A class displaces running requests of classes with a larger number."""
    ttft_s: float
    """Target for the time to first token, seconds."""
    tpot_s: float
    """Target for the time per output token, seconds."""
    max_tokens: int = 4096
    """The most output tokens a request of this class may ask for."""
    max_queued: int = 1024
    """Requests of this class that may wait for their first slot before further ones are refused."""
    admission: Literal["wait", "reject"] = "wait"
    """Of a request whose first token cannot be in time: whether it waits all the same, or is refused."""
    speculation: str | int = "auto"
    """Draft tokens per step: a number, "off", or "auto" for as many as pay."""
    speculative_prefix: int = 0
    """The first tokens of an answer, this many at most, that the draft writes alone while the verifier reads the prompt."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. The edge validates ranges; the engine trusts them.

    The order is: penalties, `min_tokens`, temperature, top-k, top-p, min-p, all in float32.
    """

    max_tokens: int
    seed: int
    """Noise is a function of (seed, position). The edge assigns one when the client gives none. 0 <= seed < 2**64."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    """Until this many tokens are out, stop tokens have probability 0."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's end-of-sequence tokens; empty when the client set `ignore_eos`."""
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """How many of the most likely tokens to report at each position (0: only the chosen one). None: no logprobs."""
    watch_end: bool = False
    """Whether logprobs are to say how likely the end was."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `n > 1` is several of these that share a scope."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    slo_class: str
    tenant: str = ""
    session_id: str | None = None
    """The conversation it is a turn of: its blocks are kept for the next."""
    scope: str | None = None
    """Whose KV blocks this request may share; None shares with nobody. See `tailserve.engine.sessions`."""
    num_public: int = 0
    """Tokens that its prompt begins with and that the operator has declared public: anybody may share their blocks."""
    adapter: str = ""
    """Part of the block hash: blocks of different adapters differ."""
    age_s: float = 0.0
    """Seconds since the client's request arrived. Clocks never cross processes, ages do."""
    timeout_s: float | None = None
    """The request ends, with what it has, this many seconds after it arrived."""
    traceparent: str = ""
    """W3C's, of the span that this request is; empty if nobody traces it."""
    carried: tuple[int, ...] | None = None
    """The answer so far, where an instance that was lost had accepted the request: it goes on behind that, and is not
    refused. None for a new one."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a chosen token under the model before penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first, as (token id, logprob)."""
    end: float | None = None
    """Of an end-of-sequence token in its place, for requests that watch it."""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """What a finished request cost. Counts of tokens."""

    cached_tokens: int = 0
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0
    prefix_tokens: int = 0
    """The answer's first tokens that are the draft's alone."""


class Timeline(msgspec.Struct, frozen=True, array_like=True):
    """Where a request's time went."""

    queue_s: float = 0.0
    """From its arrival to its first step."""
    prefill_s: float = 0.0
    """From there to its first token."""
    decode_s: float = 0.0
    """From there to its last."""
    paused_s: float = 0.0
    """What of that others had its slot."""
    num_preemptions: int = 0
    num_steps: int = 0

    @property
    def parts(self) -> tuple[float, float, float]:
        """Queue, prefill, decode."""
        return self.queue_s, self.prefill_s, self.decode_s


class TokenChunk(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step made for one request; the last chunk of a request has a `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage = Usage()
    """What the request has cost so far."""
    error: str | None = None
    """Set with FinishReason.ERROR and LOST."""
    timeline: Timeline | None = None
    """In a last one, at the instance that ended it."""


Candidates = tuple[list[int], list[float]]
"""Token ids, and the probability of each: what a draft token was drawn from."""


class RowJoin(msgspec.Struct, frozen=True, array_like=True):
    """A sequence the verifier is to keep from now on. Set by the scheduler, sent once per (re)start of a sequence, and where
    tokens were added that the verifier did not make."""

    row: int
    token_ids: list[int]
    """All known tokens, prompt first."""
    prompt_len: int
    block_ids: list[int]
    sampling: SamplingParams
    traceparent: str = ""
    """Of the request."""


class BlockMove(msgspec.Struct, frozen=True, array_like=True):
    """One KV block's content is copied between the verifier's device and its host memory. Set by the scheduler."""

    block: int
    """On the device."""
    host_block: int
    to_host: bool


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """One engine step, packed: entry i of each list belongs to the same row. All fields are set by the scheduler.

    Row `rows[i]` computes its known tokens `starts[i] : starts[i] + lengths[i]`, followed by its draft tokens, if any. The
    message does not grow with the context: rows keep their tokens, parameters and block tables.
    """

    step: int
    rows: list[int]
    starts: list[int]
    """Tokens whose KV is valid: everything behind it (a rejected draft, say) is rolled back."""
    lengths: list[int]
    samples: list[bool]
    """False for a prompt chunk that is not the prompt's last."""
    drafts: dict[int, list[int]]
    """Row to draft tokens; rows without drafts are absent."""
    new_blocks: dict[int, list[int]]
    """Row to block ids appended to its table."""
    joins: list[RowJoin]
    leaves: list[int]
    candidates: dict[int, list[Candidates]] = {}
    """Row to one entry per draft token, for drafts that were drawn by chance."""
    branches: dict[int, list[list[int]]] = {}
    """Row to further drafts for the same place, verified beside the one in `drafts`: that of which most holds counts.
    Entries of one token only."""
    states: bool = False
    """Whether the draft is to get the hidden states of this step's tokens, if it reads them."""
    moves: list[BlockMove] = []
    """Made in this order, before anything is computed."""


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What the verifier made of a `Batch`. All fields are set by the verifier."""

    step: int
    token_ids: list[list[int]]
    """For each entry of `Batch.rows`: accepted draft tokens and the one token of the verifier's own behind them; empty
    for entries that do not sample."""
    logprobs: dict[int, list[TokenLogprob]]
    """Row to one entry per token, for rows that asked."""
    duration_s: float
    moved_s: float = 0.0
    """What of it the moves of blocks took."""


class ProfiledStep(NamedTuple):
    """A step that was measured before there was traffic."""

    num_tokens: int
    seconds: float
    unsampled: int = 0
    """Those of its tokens whose logits were not wanted."""
    excess: int = 0
    """Tokens of context that it read, beyond `cost.CONTEXT` a sequence."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the verifier reports about the model it has loaded. The scheduler lays out its blocks by it."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    num_host_blocks: int = 0
    """Of the second tier."""
    block_size: int
    kv_bytes_per_token: int
    attention_backend: str
    device: str
    """cpu or cuda."""
    step_profile: tuple[ProfiledStep, ...] = ()
    """Steps that were measured after loading."""
