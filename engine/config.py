"""The engine's configuration: resolved once, never changed."""

from __future__ import annotations

from typing import Literal

import msgspec

from tailserve.engine.errors import ConfigError
from tailserve.engine.types import ProfiledStep, SloClass


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler and the engine go by. Sizes are in tokens unless they say otherwise."""

    classes: tuple[SloClass, ...]
    scheduling_policy: Literal["slack", "priority", "fcfs"] = "slack"
    """What decides who is in a step: slack; the class's priority alone, which takes no slot from anybody (vLLM's rule); or
    who came first."""
    max_wait_s: float = 60.0
    """A request for which nothing was done for so long goes before all others, one at a time."""
    max_num_seqs: int = 64
    """Sequences that may run at once."""
    max_num_batched_tokens: int = 512
    """Tokens of one step: prompt chunks, single tokens and draft tokens together."""
    max_mixed_tokens: int = 512
    """Tokens, drafts aside, of a step in which some generate and prompts are read: a long prompt shall not hold them up.
    Prompts get half of them at least."""
    max_model_len: int
    """Prompt and answer together."""
    num_blocks: int
    block_size: int = 16
    num_host_blocks: int = 0
    """Blocks of a second tier, for what sessions and displaced sequences lose of the first."""
    enable_prefix_caching: bool = True
    session_ttl_s: float = 600.0
    """For how long a session's blocks are kept after an answer, at most."""
    session_share: float = 0.5
    """Of the blocks, how many all sessions together may keep; each tenant an equal part of them, and of the second tier."""
    step_profile: tuple[ProfiledStep, ...] = ()
    """Steps that were measured before there was traffic."""
    sampled_drafts: bool = False
    """Above temperature 0, drafts are drawn by chance instead of taking the most likely tokens: more of them are accepted,
    but the answer to a seed then depends on the draft."""
    num_outcomes: int = 0
    """Outcomes of a step, per sequence, that the draft prepares for while the verifier works; 0 lets it wait."""
    draft_branches: int = 1
    """Drafts of one sequence that a step verifies, at most."""
    draft_timeout_s: float = 0.05
    """How long a step may wait for the draft. Late drafts are dropped."""

    @property
    def paced(self) -> bool:
        """Whether the targets of the classes decide."""
        return self.scheduling_policy == "slack"

    def __post_init__(self) -> None:
        if not self.classes:
            raise ConfigError("slo_classes is empty: configure at least one class", param="slo_classes")
        if len({c.name for c in self.classes}) != len(self.classes):
            raise ConfigError("slo_classes names a class twice: give each its own name", param="slo_classes")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: every "
                "running sequence needs a token per step; raise the former or lower the latter",
                param="max_num_batched_tokens",
            )
        capacity = self.num_blocks * self.block_size
        if capacity < self.max_model_len:
            raise ConfigError(
                f"the KV cache holds {capacity} tokens, fewer than max_model_len={self.max_model_len}: one request could "
                "never finish; give the cache more memory or lower max_model_len",
                param="max_model_len",
            )
