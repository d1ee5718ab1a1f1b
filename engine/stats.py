"""What the engine knows about itself. Counters only grow; gauges are as of the last step."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, kw_only=True):
    """Counts since the engine started; the scheduler and the engine add to them."""

    steps: int = 0
    verifier_seconds: float = 0.0
    """Time the verifier spent on them."""
    prompt_tokens: int = 0
    """Prompt tokens of requests that started."""
    generated_tokens: int = 0
    prefix_tokens: int = 0
    """Those of them that a draft wrote alone."""
    prefix_cache_queries: int = 0
    """Tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    host_cache_hits: int = 0
    """Those of them that came from the second tier."""
    moved_blocks: int = 0
    """Blocks copied to the second tier and back."""
    move_seconds: float = 0.0
    preemptions: int = 0
    drafts: int = 0
    """Times that a sequence's next tokens were drafted, in one branch or several."""
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    accepted_by_position: list[int] = []
    """Those of them at a draft's first place, its second, and so on."""
    drafted_by_kind: dict[str, int] = {}
    accepted_by_kind: dict[str, int] = {}
    draft_timeouts: int = 0
    foreseen_drafts: int = 0
    """Drafts prepared while the verifier worked; those beyond `foresight_hits` were for nothing."""
    foresight_hits: int = 0
    foresight_misses: int = 0
    draft_seconds: float = 0.0
    """Time the draft spent."""
    drafted_steps: int = 0
    """Steps with draft tokens in them."""
    executor_restarts: int = 0
    finished: dict[str, int] = {}
    """Finish reason to requests."""


class InstanceLoad(msgspec.Struct, frozen=True, array_like=True):
    """How long who comes to an instance has to wait; it travels with the tokens, to those who choose among instances."""

    num_waiting: int
    waits_s: dict[str, float]
    """Class to seconds until the first token of a request that comes now, the reading of its own prompt aside."""
    token_s: float
    """Seconds for each token of a prompt."""


class EngineGauges(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the moment."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share of the blocks in use, 0 to 1."""
    host_kv_cache_usage: float = 0.0
    """Of those of the second tier."""
