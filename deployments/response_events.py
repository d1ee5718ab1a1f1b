"""The Responses API's answers: a response object, and the events of its growing."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tailserve.deployments.generation import Generation, Piece
from tailserve.deployments.responses import ResponseFormat, TextPosition
from tailserve.deployments.responses_body import ResponsesBody
from tailserve.engine.errors import TailserveError
from tailserve.engine.types import FinishReason

logger = logging.getLogger(__name__)

Event = dict[str, Any]


@dataclass
class ResponseObject:
    """One response as it grows."""

    id: str
    body: ResponsesBody
    chat: ResponseFormat
    session_id: str | None
    generation: Generation
    created_at: int = field(default_factory=lambda: int(time.time()))
    text: str = ""
    status: str = "in_progress"
    stop_reason: int | str | None = None
    """Which stop string, token or early stop ended it."""
    error: dict[str, str] | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    on_end: Callable[[], None] | None = None
    """Called when the answer has ended, before its client knows."""

    @property
    def item_id(self) -> str:
        return f"msg_{self.id.removeprefix('resp_')}"

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def item(self, *, content: bool = True) -> dict[str, Any]:
        status = self.status if self.status in ("in_progress", "completed") else "incomplete"
        parts = [self.part()] if content else []
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": parts}

    def data(self) -> dict[str, Any]:
        """The response object."""
        body = self.body
        done = self.status != "in_progress"
        reason = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "background": bool(body.background),
            "created_at": self.created_at,
            "status": self.status,
            "stop_reason": self.stop_reason,
            "error": self.error,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.chat.model,
            "output": [self.item()] if done else [],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": self.chat.service_tier or "default",
            "session_id": self.session_id,
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def take(self, piece: Piece, position: TextPosition) -> list[dict[str, Any]]:
        """Adds a piece of text; the logprobs of its tokens."""
        self.text += piece.text
        entries: list[dict[str, Any]] = (self.chat.logprobs(piece.logprobs, position) or {}).get("content", [])
        self.logprobs += entries
        if piece.finish_reason is not None:
            ends = {FinishReason.STOP: "completed", FinishReason.LENGTH: "incomplete", FinishReason.ABORT: "cancelled"}
            self.status, self.stop_reason = ends[piece.finish_reason], piece.stop_reason
        return entries

    def _usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = self.generation.usage()
        details = usage["completion_tokens_details"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0} | details,
            "total_tokens": usage["total_tokens"],
        }


async def response_events(response: ResponseObject) -> AsyncIterator[Event]:
    """All events of a response, numbered. Whatever goes wrong after the first is an event, too."""
    number = -1

    def event(kind: str, **fields: Any) -> Event:
        nonlocal number
        number += 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    place = {"item_id": response.item_id, "output_index": 0, "content_index": 0}
    yield event("created", response=response.data())
    yield event("in_progress", response=response.data())
    yield event("output_item.added", output_index=0, item=response.item(content=False))
    yield event("content_part.added", **place, part=response.part())
    position = TextPosition()
    try:
        async for piece in response.generation.pieces():
            logprobs = response.take(piece, position)
            if piece.text or logprobs:
                yield event("output_text.delta", **place, delta=piece.text, logprobs=logprobs)
    except Exception as error:
        if not isinstance(error, TailserveError):
            logger.exception("response %s failed", response.id)
        message = error.message if isinstance(error, TailserveError) else f"internal error: {type(error).__name__}"
        response.status = "failed"
        response.error = {"code": "server_error", "message": message}
    if response.on_end is not None:
        response.on_end()
    if response.status == "failed":
        yield event("failed", response=response.data())
        return
    yield event("output_text.done", **place, text=response.text, logprobs=response.logprobs)
    yield event("content_part.done", **place, part=response.part())
    yield event("output_item.done", output_index=0, item=response.item())
    yield event("completed" if response.status == "completed" else "incomplete", response=response.data())


async def server_sent(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    """Events as they go over HTTP."""
    async for event in events:
        head = f"id: {event['sequence_number']}\nevent: {event['type']}\ndata: "
        yield head.encode() + msgspec.json.encode(event) + b"\n\n"
