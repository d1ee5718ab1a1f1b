"""How long a step may take, and what fits into it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence as List
from itertools import accumulate

from tailserve.engine import slo
from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import CONTEXT, StepTimes
from tailserve.engine.host_tier import HostTier
from tailserve.engine.pace import PROGRESS, REVIEW_S, Pace
from tailserve.engine.sequence import Sequence

UNTRIED_MOVES = 16
"""Blocks that a step loads of a sequence while it is not known how long that takes."""
MOST_MOVING_S = 1.0
"""What loading may take of a step where nothing else limits it."""
IN_DEBT = 0.85
"""Of what those that generate can bear, how long prompts of tenants in debt may make a step: there is always one of these to
read, and each step of the others would be as long as they can bear."""


class StepPlan:
    """What is in a step so far, and what more fits."""

    def __init__(
        self,
        times: StepTimes,
        host: HostTier,
        *,
        limit_s: float,
        reading_s: float,
        in_debt_s: float,
        max_tokens: int,
        max_prompt_tokens: int,
    ) -> None:
        """`reading_s`: how long the step may become by prompts; `in_debt_s`: by those of tenants in debt. `max_tokens`, and
        of these `max_prompt_tokens` of prompts: whatever the time. What it moves from and to `host` takes time, too."""
        self._times = times
        self._host = host
        self.limit_s = limit_s
        self.reading_s = reading_s
        self.in_debt_s = in_debt_s
        self.tokens_left = max_tokens
        self.prompt_tokens_left = max_prompt_tokens
        self.loads = False
        """Blocks of a sequence are being loaded: something is done, be it without a token."""
        self._tokens = self._unsampled = self._excess = 0

    @property
    def empty(self) -> bool:
        return self._tokens == 0

    @property
    def seconds(self) -> float:
        """What the step takes so far."""
        return self._predict(0, 0, 0) if self._tokens else self._moving_s

    @property
    def _moving_s(self) -> float:
        return len(self._host.moves) * self._times.move_s

    def add_generating(self, seq: Sequence) -> None:
        self._tokens += 1
        self.tokens_left -= 1
        self._excess += seq.num_scheduled + 1 - CONTEXT

    def add_prompt(self, seq: Sequence, count: int, *, sampled: bool) -> None:
        self._tokens += count
        self.tokens_left -= count
        self.prompt_tokens_left -= count
        self._unsampled += count - sampled
        self._excess += seq.num_scheduled + count - CONTEXT

    def count_generating(self, seqs: List[Sequence], limit_s: float) -> int:
        """How many of them, from the first on, fit into `limit_s`."""
        most = min(len(seqs), self.tokens_left)
        if limit_s == math.inf:
            return most
        excess = [0, *accumulate(seq.num_scheduled + 1 - CONTEXT for seq in seqs)]
        return bisect_right(range(1, most + 1), limit_s, key=lambda count: self._predict(count, 0, excess[count]))

    def count_prompt(self, seq: Sequence, wanted: int, limit_s: float, *, urgent: bool) -> int:
        """How many of a prompt's next tokens fit into `limit_s`. For `urgent` ones that is the only limit on prompts."""
        most = min(wanted, self.tokens_left if urgent else min(self.tokens_left, self.prompt_tokens_left))
        if limit_s == math.inf:
            return max(most, 0)
        begin = seq.num_scheduled - CONTEXT
        return bisect_right(range(1, most + 1), limit_s, key=lambda count: self._predict(count, count, begin + count))

    def count_moves(self, limit_s: float) -> int:
        """How many blocks can be loaded within `limit_s`, one at least, each of them pushing out another."""
        if not self._times.move_s:
            return UNTRIED_MOVES
        left = min(limit_s - self.seconds, MOST_MOVING_S - self._moving_s)
        return max(int(left / (2 * self._times.move_s)), 1)

    def count_drafts(self) -> int:
        """Draft tokens that fit."""
        most = max(self.tokens_left, 0)
        if self.limit_s == math.inf:
            return most
        return bisect_right(range(1, most + 1), self.limit_s, key=lambda count: self._predict(count, 0, 0))

    def _predict(self, tokens: int, unsampled: int, excess: int) -> float:
        seconds = self._times.predict(
            self._tokens + tokens, unsampled=self._unsampled + unsampled, excess=self._excess + excess
        )
        return (seconds or 0.0) + self._moving_s


class Planner:
    """The rule for a step's time: the least slack among running sequences of guarded classes, no more than whoever may
    arrive can wait for, and never less than what makes progress."""

    def __init__(self, config: EngineConfig, times: StepTimes) -> None:
        self._config = config
        self._times = times
        self._guarded = slo.guarded_classes(config.classes)
        self._longest_s = slo.longest_step(config.classes)
        self._reviewed_s = float("-inf")
        self.paces = {
            some.name: Pace(some, times, config.max_num_seqs, guarded=some.name in self._guarded) for some in config.classes
        }

    def open(self, running: List[Sequence], host: HostTier, now: float, start: float) -> StepPlan:
        """An empty step that will begin at `start`, for these running sequences. `host`: their second tier."""
        config = self._config
        generating = [seq for seq in running if seq.num_pending == 1]
        prompts = config.max_num_batched_tokens - len(generating)
        if generating:
            prompts = min(prompts, max(config.max_mixed_tokens - len(generating), config.max_mixed_tokens // 2))
        limit = self._limit(running, generating, now, start)
        reading = in_debt = limit
        if config.paced and generating:
            # Prompts shall not make a step longer than those that generate in it can bear, or not by much.
            alone = self._times.predict(len(generating), excess=sum(seq.num_scheduled + 1 - CONTEXT for seq in generating))
            bearable = min(seq.aimed_s for seq in generating)
            least = PROGRESS * (alone or 0.0)
            reading = min(limit, max(bearable, least))
            in_debt = min(limit, max(IN_DEBT * bearable, least))
        return StepPlan(
            self._times,
            host,
            limit_s=limit,
            reading_s=reading,
            in_debt_s=in_debt,
            max_tokens=config.max_num_batched_tokens,
            max_prompt_tokens=prompts,
        )

    def is_guarded(self, seq: Sequence) -> bool:
        return seq.slo.name in self._guarded

    def cap(self, name: str) -> int:
        """How many of a class may run without costing each other their pace."""
        return self.paces[name].cap if self._config.paced else self._config.max_num_seqs

    def _limit(self, running: List[Sequence], generating: List[Sequence], now: float, start: float) -> float:
        if not self._config.paced:
            return math.inf
        if now >= self._reviewed_s + REVIEW_S:
            self._reviewed_s = now
            for name, pace in self.paces.items():
                pace.review([seq for seq in running if seq.slo.name == name])
        limit = self._longest_s
        guarded = [seq for seq in generating if self.is_guarded(seq)]
        first = min((seq.slo.priority for seq in guarded), default=0)
        for seq in guarded:
            slack = slo.next_due(seq) - start
            # Who is behind is waited for, but only the most urgent class catches up at the others' cost.
            limit = min(limit, slack if seq.slo.priority == first else max(slack, seq.aimed_s))
        least = PROGRESS * (self._times.predict(1, excess=0) or 0.0)
        sure = [seq.num_scheduled + 1 - CONTEXT for seq in guarded if seq.slo.priority == first]
        if sure:
            least = max(least, self._times.predict(len(sure), excess=sum(sure)) or 0.0)
        return max(limit, least)
