"""From chunks of tokens to pieces of text: what a response is made of, whatever its format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tailserve.cluster.early_stop import EarlyStopConfig
from tailserve.deployments.client import RouterClient
from tailserve.deployments.early_stop import EarlyStop
from tailserve.deployments.text import Detokenizer, StopStrings, TextModel
from tailserve.engine.errors import InternalError
from tailserve.engine.types import FinishReason, Request, Timeline, TokenChunk, TokenLogprob, Usage

if TYPE_CHECKING:
    from tailserve.deployments.request_span import RequestSpan

NUM_BEHIND = 4
"""Tokens of a prompt that say how a completion's first one reads."""


@dataclass(frozen=True)
class Piece:
    """What one step added to one choice."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    speculative_prefix: bool = False
    """The draft wrote it alone."""


@dataclass
class Choice:
    """One of a response's sequences as it grows."""

    index: int
    request: Request
    detokenizer: Detokenizer
    stops: StopStrings
    early: EarlyStop | None = None
    show_logprobs: bool = True
    operation: str = "chat"
    """By OpenTelemetry's GenAI conventions."""
    num_tokens: int = 0
    said: str = ""
    """The text so far."""
    ended: FinishReason | None = None
    """Why; None while it grows."""
    timeline: Timeline | None = None
    """What its instance says of it at the end."""
    cut: bool = False
    """It ended before its last token."""
    usage: Usage = field(default_factory=Usage)
    begun_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    """When its first token came, by the monotonic clock; None before."""
    last_s: float = 0.0
    on_gap: Callable[[float], None] | None = None
    """See `Generation.on_gap`."""

    def take(self, chunk: TokenChunk) -> Piece | None:
        """The piece a chunk adds; None if it adds nothing to show."""
        self.num_tokens += len(chunk.token_ids)
        if chunk.token_ids:
            now = time.monotonic()
            if self.first_s is None:
                self.first_s = now
            elif self.on_gap is not None:
                self.on_gap(now - self.last_s)
            self.last_s = now
        alone = 0 < self.num_tokens <= chunk.usage.prefix_tokens
        final = chunk.finish_reason is not None
        self.usage, self.timeline = chunk.usage, chunk.timeline
        # A stop token is not part of the answer.
        shown = chunk.token_ids[:-1] if chunk.finish_reason is FinishReason.STOP else chunk.token_ids
        text, stop, num_read = self._read(shown, chunk, final=final)
        logprobs = (chunk.logprobs or ())[:num_read] if self.show_logprobs else ()
        if stop is not None:
            self.num_tokens -= len(chunk.token_ids) - num_read
            self.ended, self.cut = FinishReason.STOP, True
            return Piece(self.index, text, logprobs, FinishReason.STOP, stop, alone)
        self.said += text
        self.ended = chunk.finish_reason
        if not text and not final and not logprobs:
            return None
        return Piece(self.index, text, logprobs, chunk.finish_reason, chunk.stop_reason, alone)

    @property
    def finished(self) -> bool:
        return self.ended is not None

    @property
    def ttft_s(self) -> float | None:
        """From the request's arrival to the first token; None without one."""
        return None if self.first_s is None else self.first_s - self.begun_s + self.request.age_s

    @property
    def whole_s(self) -> float:
        """From the request's arrival to the last token; 0 without one."""
        return 0.0 if self.first_s is None else self.last_s - self.begun_s + self.request.age_s

    @property
    def tpot_s(self) -> float:
        """Time per output token behind the first."""
        return 0.0 if self.first_s is None else (self.last_s - self.first_s) / max(self.num_tokens - 1, 1)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and answer, as far as it was shown."""
        return self.request.prompt_token_ids + tuple(self.detokenizer.token_ids)

    def _read(self, shown: Sequence[int], chunk: TokenChunk, *, final: bool) -> tuple[str, str | None, int]:
        """The text of a chunk's tokens, why it ends before them all, if it does, and how many it is of."""
        if self.early is None and not self.stops:
            return self.detokenizer.push(shown, final=final), None, len(shown)
        text = ""
        num_before = self.num_tokens - len(chunk.token_ids)
        # One by one: an answer ends with the same token whether a draft came with it or not.
        for place, token_id in enumerate(shown):
            whole = self.detokenizer.push([token_id])
            piece, early = self._judge(token_id, whole, chunk, place)
            if num_before + place + 1 < self.request.sampling.min_tokens:
                text += whole
                continue
            piece, stop = self.stops.push(piece, final=early is not None)
            text += piece
            if stop is not None or early is not None:
                return text, stop if stop is not None else early, place + 1
        piece, stop = self.stops.push(self.detokenizer.push([], final=final), final=final)
        return text + piece, stop, len(shown)

    def _judge(self, token_id: int, piece: str, chunk: TokenChunk, place: int) -> tuple[str, str | None]:
        """A token's text, and why the answer ends early in it, if it does: the text is then cut."""
        if self.early is None:
            return piece, None
        kept, reason = self.early.push(token_id, piece, chunk.logprobs[place].end if chunk.logprobs else None)
        return (kept, reason) if reason is not None else (piece, None)


class Generation:
    """All sequences of one HTTP request. Leaving it, however, ends what still runs."""

    def __init__(
        self,
        client: RouterClient,
        text: TextModel,
        requests: list[Request],
        *,
        operation: str = "chat",
        choices_per_prompt: int = 1,
        stops: list[str],
        early_stop: EarlyStopConfig | None = None,
        show_logprobs: bool = True,
    ) -> None:
        """`early_stop`: heuristics that may end an answer. `show_logprobs`: whether the client asked for them."""
        self._client = client
        self._choices_per_prompt = choices_per_prompt
        self._queue: asyncio.Queue[TokenChunk] = asyncio.Queue()
        self.choices = [
            Choice(
                index,
                request,
                # A chat's answer is a text of its own; a completion goes on in the middle of one.
                Detokenizer(text.decode, () if operation == "chat" else request.prompt_token_ids[-NUM_BEHIND:]),
                StopStrings(stops),
                None if early_stop is None else EarlyStop(early_stop),
                show_logprobs,
                operation,
            )
            for index, request in enumerate(requests)
        ]
        self.span: RequestSpan | None = None
        """Where it is traced."""
        self.on_close: list[Callable[[], None]] = []
        """Called once, when nobody reads any more."""
        self.on_complete: Callable[[Choice], None] | None = None
        """Called with each choice that was read to its end."""
        self.on_end: Callable[[Choice, FinishReason], None] | None = None
        """Called with each choice that ended, and why."""
        self.on_gap: Callable[[float], None] | None = None
        """Called with the seconds from each piece to the next of its choice."""

    async def start(self) -> None:
        """Places all sequences. If one is refused, none runs."""
        for choice in self.choices:
            choice.on_gap = self.on_gap
        try:
            for choice in self.choices:
                await self._client.submit(choice.request, self._queue)
        except BaseException:
            # A refusal is no end.
            self.on_end = None
            self.close()
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces as they are made, of all choices, until all have ended.

        InternalError if one cannot be completed.
        """
        by_id = {choice.request.id: choice for choice in self.choices}
        open_choices = len(by_id)
        try:
            while open_choices:
                chunk = await self._queue.get()
                choice = by_id[chunk.request_id]
                if choice.finished:
                    continue
                if chunk.finish_reason is FinishReason.ERROR:
                    choice.ended = FinishReason.ERROR
                    self._note_end(choice)
                    raise InternalError(chunk.error or "the request could not be completed")
                piece = choice.take(chunk)
                ended = choice.finished
                if ended:
                    open_choices -= 1
                    if chunk.finish_reason is None:
                        self._client.cancel(chunk.request_id)
                    elif not choice.cut and chunk.finish_reason is not FinishReason.ABORT and self.on_complete:
                        self.on_complete(choice)
                try:
                    if piece is not None:
                        yield piece
                finally:
                    # The last piece need not wait for what is counted of its answer.
                    if ended:
                        self._note_end(choice)
        finally:
            self.close()

    def _note_end(self, choice: Choice) -> None:
        if self.on_end is not None and choice.ended is not None:
            self.on_end(choice, choice.ended)

    def abort(self) -> None:
        """Ends the sequences that still run; the response ends with finish reason "abort"."""
        for choice in self.choices:
            if not choice.finished:
                self._client.cancel(choice.request.id)
                self._queue.put_nowait(TokenChunk(choice.request.id, finish_reason=FinishReason.ABORT, usage=choice.usage))

    def close(self) -> None:
        """Nobody reads any more: ends what still runs."""
        for choice in self.choices:
            if not choice.finished:
                choice.ended = FinishReason.ABORT
                self._client.cancel(choice.request.id)
                self._note_end(choice)
        while self.on_close:
            self.on_close.pop()()

    def usage(self) -> dict[str, object]:
        """The `usage` object of the response so far."""
        # The choices of one prompt stand side by side, and the prompt counts once.
        firsts = self.choices[:: self._choices_per_prompt]
        num_prompt = sum(len(choice.request.prompt_token_ids) for choice in firsts)
        num_output = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(choice.usage.cached_tokens for choice in firsts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(choice.usage.accepted_draft_tokens for choice in self.choices),
                "rejected_prediction_tokens": sum(choice.usage.rejected_draft_tokens for choice in self.choices),
                "speculative_prefix_tokens": sum(choice.usage.prefix_tokens for choice in self.choices),
            },
        }
