"""The one mutable record of a request inside the engine."""

from __future__ import annotations

from typing import NamedTuple

from tailserve.engine.blocks import chain_hash, join_hash, root_hash
from tailserve.engine.speculation.acceptance import OwnRecord
from tailserve.engine.types import Request, SloClass, Timeline, Usage

PUBLIC_SCOPE = "public"


class Key(NamedTuple):
    """A place in line: sequences go in the order of these."""

    level: int
    """The class's priority; less for a sequence that has waited for too long; 0 for all with first come, first served."""
    late: bool
    """Its first token cannot be in time any more."""
    tag: float
    """Its turn within the class, in tokens served: see `FairShares`."""
    number: int


class Sequence:
    """A request's tokens, how far they are computed, and what it holds. Only the scheduler changes it.

    There is no prefill and no decode phase: `num_computed` catches up with `len(token_ids)`. Steps under way have their
    share in `num_scheduled` and `num_sampling` already, so that the next can be scheduled behind them.
    """

    __slots__ = (
        "aimed_s",
        "arrival_s",
        "awaits_prefix",
        "begun_s",
        "block_ids",
        "charge",
        "draft_record",
        "due_s",
        "epoch",
        "first_due_s",
        "hashes",
        "key",
        "max_len",
        "moved_s",
        "num_accepted_drafts",
        "num_cached",
        "num_computed",
        "num_drafted",
        "num_found",
        "num_kept",
        "num_losses",
        "num_preemptions",
        "num_prefix",
        "num_registered",
        "num_reserved",
        "num_sampling",
        "num_scheduled",
        "num_steps",
        "pace_s",
        "paused",
        "paused_s",
        "promoted",
        "prompt_len",
        "request",
        "root",
        "row",
        "slo",
        "started_s",
        "token_ids",
        "token_s",
    )

    def __init__(
        self,
        request: Request,
        slo: SloClass,
        arrival_s: float,
        key: Key,
        max_model_len: int,
        *,
        charge: float = 0.0,
        epoch: int = 0,
    ) -> None:
        """`charge`: what its tenant was charged for it beforehand. `epoch`: how often its session was deleted."""
        self.request = request
        self.slo = slo
        self.arrival_s = arrival_s
        self.charge = charge
        self.epoch = epoch
        self.key = key
        """Place in line. Keeps its value when the sequence is preempted."""
        self.promoted = False
        """It goes before everybody, since it had waited for too long."""
        self.first_due_s = arrival_s + slo.ttft_s
        """When its first token is due."""
        self.due_s: float | None = None
        """When its next token is; None before the first."""
        self.aimed_s = slo.tpot_s
        """Seconds for each of its tokens that are aimed at."""
        self.begun_s: float | None = None
        """When its first token was made; None before."""
        self.pace_s: float | None = None
        """Seconds for each of its last tokens, a running mean; None before the second."""
        self.token_s: float | None = None
        """When its last token was made; None before the first, and where it has lost its place since."""
        self.started_s: float | None = None
        """When it was first part of a step; None before."""
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_losses = 0
        """Losses of the verifier that it met since it last got a token."""
        self.paused = False
        """It has lost its slot, and was part of no step since."""
        self.paused_s = 0.0
        """How long that was, all times together."""
        self.moved_s = arrival_s
        """When a step last did something for it, or when it came."""
        self.token_ids = [*request.prompt_token_ids, *(request.carried or ())]
        self.prompt_len = len(request.prompt_token_ids)
        self.max_len = min(self.prompt_len + request.sampling.max_tokens, max_model_len)
        self.num_computed = 0
        self.num_scheduled = 0
        """Tokens computed once the steps under way have ended; `num_computed` when none is."""
        self.num_sampling = 0
        """Tokens that the steps under way will append, at least: one for each that samples for it."""
        self.num_cached: int | None = None
        """Prompt tokens found in the prefix cache at the first start, or in the second tier; None before it."""
        self.num_found = 0
        """Tokens that were in the prefix cache or the second tier when it came, or when it was admitted."""
        self.row: int | None = None
        """The verifier's name for it; None while it waits."""
        self.block_ids: list[int] = []
        self.hashes: list[bytes] = []
        self.num_reserved = 0
        """Free blocks that are its own, for what is still to be loaded."""
        self.num_kept = 0
        """Blocks whose content is kept for it from when it was displaced until it is loaded."""
        self.num_registered = 0
        """Blocks already offered to the prefix cache."""
        self.awaits_prefix = False
        """The draft is to write its first tokens, while the verifier reads all of the prompt but its last token."""
        self.num_prefix = 0
        self.num_drafted = 0
        self.draft_record = OwnRecord()
        self.num_accepted_drafts = 0
        # A request that shares with nobody still finds its own blocks again after a preemption.
        scope = request.scope if request.scope is not None else f"request:{request.id}"
        self.root = root_hash(f"{epoch}:{scope}" if epoch else scope, request.adapter)

    @property
    def group(self) -> tuple[str, str]:
        """Its class and its tenant."""
        return self.slo.name, self.request.tenant

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Tokens to compute that are known, or will be once the steps under way have ended; 1 while generating.

        0 if those steps are sure to end it.
        """
        num_tokens = len(self.token_ids) + self.num_sampling
        return num_tokens - self.num_scheduled if num_tokens < self.max_len else 0

    def expired(self, now: float) -> bool:
        timeout_s = self.request.timeout_s
        return timeout_s is not None and now - self.arrival_s >= timeout_s

    def block_hashes(self, count: int, block_size: int) -> list[bytes]:
        """Hashes of the first `count` full blocks."""
        while len(self.hashes) < count:
            begin = len(self.hashes) * block_size
            self.hashes.append(chain_hash(self._parent(block_size), self.token_ids[begin : begin + block_size]))
        return self.hashes[:count]

    def _parent(self, block_size: int) -> bytes:
        """Of the next block's hash."""
        num_public, count = self.request.num_public // block_size, len(self.hashes)
        if count < num_public:
            return self.hashes[-1] if count else root_hash(PUBLIC_SCOPE, self.request.adapter)
        if count == num_public:
            # Behind what is public the scope begins.
            return join_hash(self.root, self.hashes[-1]) if count else self.root
        return self.hashes[-1]

    def note_step(self, now: float) -> None:
        """It is part of a step."""
        self.num_steps += 1
        if self.started_s is None:
            self.started_s = now
        elif self.paused:
            self.paused_s += max(now - self.moved_s, 0.0)
        self.paused = False

    def timeline(self) -> Timeline:
        """As of the last thing that was done for it."""
        started = self.moved_s if self.started_s is None else self.started_s
        begun = self.moved_s if self.begun_s is None else self.begun_s
        # With two steps under way the next begins before the last is known to have ended.
        return Timeline(
            queue_s=max(started - self.arrival_s, 0.0),
            prefill_s=max(begun - started, 0.0),
            decode_s=max(self.moved_s - begun, 0.0),
            paused_s=self.paused_s,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
        )

    def usage(self) -> Usage:
        rejected = self.num_drafted - self.num_accepted_drafts
        return Usage(min(self.num_cached or 0, self.prompt_len), self.num_accepted_drafts, rejected, self.num_prefix)
