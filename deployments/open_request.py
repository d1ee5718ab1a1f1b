"""A request that an ingress waits for, and all it takes to carry it on when its instance is lost."""

from __future__ import annotations

import asyncio
import time

import msgspec

from tailserve.engine.types import FinishReason, Request, TokenChunk, Usage


class OpenRequest:
    """One sequence, whichever instance it is at. Each instance that takes it knows it by an id of its own, so that what one
    that was given up still says of it is nobody's."""

    def __init__(self, request: Request, queue: asyncio.Queue[TokenChunk]) -> None:
        """`queue`: gets its chunks, the last with a finish reason."""
        self.request = request
        self.attempt = request
        """As it is sent to the next instance, or was to the last."""
        self.instance: str | None = None
        """The one that has it."""
        self.lost: set[str] = set()
        """Those that had it, or did not take it."""
        self.num_carried = 0
        self._queue = queue
        self._sent_s = time.monotonic()
        self._token_ids: list[int] = []
        self._carried = Usage()
        """What it cost at the instances that are lost."""
        self._usage = Usage()

    def take(self, chunk: TokenChunk) -> None:
        """Passes on what the instance says of the attempt, as of the request."""
        self._usage = chunk.usage if not self.num_carried else self._sum(chunk.usage)
        self._token_ids += chunk.token_ids
        if self.num_carried:
            chunk = msgspec.structs.replace(chunk, request_id=self.request.id, usage=self._usage)
        self._queue.put_nowait(chunk)

    def fail(self, error: str) -> None:
        """Nobody can complete it."""
        chunk = TokenChunk(self.request.id, finish_reason=FinishReason.ERROR, usage=self._usage, error=error)
        self._queue.put_nowait(chunk)

    def carry(self) -> None:
        """Its instance is lost: the next attempt goes on from the tokens that came."""
        if self.instance is not None:
            self.lost.add(self.instance)
        self.instance = None
        self.num_carried += 1
        self._carried = self._usage
        self.attempt = msgspec.structs.replace(
            self.request,
            id=f"{self.request.id}~{self.num_carried}",
            carried=tuple(self._token_ids),
            age_s=self.request.age_s + time.monotonic() - self._sent_s,
        )

    def _sum(self, usage: Usage) -> Usage:
        before = self._carried
        return Usage(
            # Of the prompt, as the client's first token found it.
            before.cached_tokens if self.attempt.carried else usage.cached_tokens,
            before.accepted_draft_tokens + usage.accepted_draft_tokens,
            before.rejected_draft_tokens + usage.rejected_draft_tokens,
            before.prefix_tokens + usage.prefix_tokens,
        )
