"""A request that an ingress waits for, and all it takes to carry it on when its instance is lost."""

from __future__ import annotations

import asyncio
import math
import time

import msgspec

from tailserve.engine.types import FinishReason, Request, TokenChunk, Usage


class OpenRequest:
    """One sequence, whichever instance it is at. Each instance that takes it knows it by an id of its own, so that what one
    that was given up still says of it is nobody's."""

    def __init__(self, request: Request, queue: asyncio.Queue[TokenChunk]) -> None:
        """`queue`: gets its chunks, the last with a finish reason."""
        self.request = request
        self.attempt_id = request.id
        """By which the instance knows it that has it, or was asked last."""
        self.instance: str | None = None
        """The one that has it."""
        self.ingress = ""
        """What that one knows this ingress by."""
        self.lost: set[str] = set()
        """Those that had it, or did not take it."""
        self.num_carried = 0
        self.timer: asyncio.TimerHandle | None = None
        """Ends it when its own deadline has passed."""
        self._num_asked = 0
        self._queue = queue
        self._sent_s = time.monotonic()
        self._token_ids: list[int] = []
        self._carried = Usage()
        """What it cost at the instances that are lost."""
        self._usage = Usage()
        self._begun_before = False
        """Whether tokens had come when it was last carried."""

    def take(self, chunk: TokenChunk) -> None:
        """Passes on what the instance says of the attempt, as of the request."""
        self._usage = self._sum(chunk.usage) if self.num_carried else chunk.usage
        self._token_ids += chunk.token_ids
        if chunk.request_id != self.request.id:
            chunk = msgspec.structs.replace(chunk, request_id=self.request.id, usage=self._usage)
        self._queue.put_nowait(chunk)

    def fail(self, error: str) -> None:
        """Nobody completes it: by an error, or with what it has if its time is over."""
        over = self.left_s <= 0
        chunk = TokenChunk(
            self.request.id,
            finish_reason=FinishReason.LENGTH if over else FinishReason.ERROR,
            stop_reason="deadline" if over else None,
            usage=self._usage,
            error=None if over else error,
        )
        self._queue.put_nowait(chunk)

    def carry(self) -> None:
        """Its instance is lost: the next attempt goes on from the tokens that came."""
        if self.instance is not None:
            self.lost.add(self.instance)
        self.instance = None
        self.num_carried += 1
        self._carried = self._usage
        self._begun_before = self.begun

    def next_attempt(self) -> Request:
        """The request as the next instance is to get it, under an id that none knows."""
        self.attempt_id = f"{self.request.id}~{self._num_asked}" if self._num_asked else self.request.id
        self._num_asked += 1
        carried = tuple(self._token_ids) if self.num_carried else None
        return msgspec.structs.replace(self.request, id=self.attempt_id, carried=carried, age_s=self._age_s)

    @property
    def begun(self) -> bool:
        """Whether tokens of it have come."""
        return bool(self._token_ids)

    @property
    def left_s(self) -> float:
        """Seconds until the request's own deadline."""
        timeout_s = self.request.timeout_s
        return math.inf if timeout_s is None else timeout_s - self._age_s

    @property
    def _age_s(self) -> float:
        return self.request.age_s + time.monotonic() - self._sent_s

    def _sum(self, usage: Usage) -> Usage:
        before = self._carried
        return Usage(
            # Of the prompt, as the client's first token found it.
            before.cached_tokens if self._begun_before else usage.cached_tokens,
            before.accepted_draft_tokens + usage.accepted_draft_tokens,
            before.rejected_draft_tokens + usage.rejected_draft_tokens,
            before.prefix_tokens + usage.prefix_tokens,
        )
