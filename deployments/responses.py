"""Response bodies of the two completion routes: whole, and as server-sent events."""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tailserve.deployments.generation import Generation, Piece
from tailserve.deployments.openai import ChatBody, GenerationBody
from tailserve.deployments.text import TextModel
from tailserve.engine.errors import TailserveError
from tailserve.engine.types import TokenLogprob

_DONE = b"data: [DONE]\n\n"


class TextPosition:
    """Where in a choice's text its tokens begin. A character counts once its last byte is there."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def advance(self, token: bytes) -> int:
        """The offset of the next token, in characters, given its bytes."""
        offset = self._offset
        self._offset += len(self._decoder.decode(token))
        return offset


@dataclass(frozen=True)
class ResponseFormat:
    """What the pieces of one response have in common."""

    id: str
    model: str
    body: GenerationBody
    text: TextModel
    service_tier: str | None = None
    """That it was served in; None for a request that asked for none."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        return isinstance(self.body, ChatBody)

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        result: dict[str, Any] = {
            "id": self.id,
            "object": f"{kind}.chunk" if chunk and self.chat else kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.service_tier is not None:
            result["service_tier"] = self.service_tier
        return result

    def logprobs(self, entries: Sequence[TokenLogprob], position: TextPosition) -> dict[str, Any] | None:
        """The `logprobs` object of a piece of a choice, whose text so far is known to `position`."""
        if self.body.top_logprobs_count() is None:
            return None
        if self.chat:
            return {"content": [self._chat_logprob(entry) for entry in entries], "refusal": None}
        return {
            "tokens": [self._key(entry.token_id) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self._key(token_id): logprob for token_id, logprob in entry.top} if entry.top else None for entry in entries
            ],
            "text_offset": [position.advance(self.text.token_bytes(entry.token_id)) for entry in entries],
        }

    def _chat_logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        def one(token_id: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._token(token_id),
                "logprob": logprob,
                "bytes": list(self.text.token_bytes(token_id)),
            }

        chosen = one(entry.token_id, entry.logprob)
        return chosen | {"top_logprobs": [one(token_id, logprob) for token_id, logprob in entry.top]}

    def _token(self, token_id: int) -> str:
        return self.text.token_bytes(token_id).decode(errors="replace")

    def _key(self, token_id: int) -> str:
        """As `/v1/completions` names a token: by its bytes, as OpenAI does, where it is only part of a character."""
        token = self.text.token_bytes(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


async def whole_response(form: ResponseFormat, generation: Generation) -> dict[str, Any]:
    """Waits for all choices and returns the body."""
    pieces: list[list[Piece]] = [[] for _ in generation.choices]
    async for piece in generation.pieces():
        pieces[piece.index].append(piece)
    choices = []
    for index, parts in enumerate(pieces):
        text = "".join(part.text for part in parts)
        last = parts[-1]
        logprobs = [entry for part in parts for entry in part.logprobs]
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if form.chat else {"text": text}
        choices.append(
            {
                "index": index,
                **content,
                "logprobs": form.logprobs(logprobs, TextPosition()),
                "finish_reason": last.finish_reason,
                "stop_reason": last.stop_reason,
            }
        )
    return form.envelope(choices, chunk=False) | {"usage": generation.usage()}


async def event_stream(form: ResponseFormat, generation: Generation) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first byte comes as an event of its own, and ends the stream."""
    options = form.body.stream_options
    encode = msgspec.json.encode
    positions = [TextPosition() for _ in generation.choices]
    if form.chat:
        for choice in generation.choices:
            opening = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield b"data: " + encode(form.envelope([opening], chunk=True)) + b"\n\n"
    try:
        async for piece in generation.pieces():
            content = {"delta": {"content": piece.text} if piece.text else {}} if form.chat else {"text": piece.text}
            entry = {
                "index": piece.index,
                **content,
                "logprobs": form.logprobs(piece.logprobs, positions[piece.index]),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            if piece.speculative_prefix:
                entry["speculative_prefix"] = True
            event = form.envelope([entry], chunk=True)
            if options is not None and options.continuous_usage_stats:
                event["usage"] = generation.usage()
            elif options is not None and options.include_usage:
                event["usage"] = None
            yield b"data: " + encode(event) + b"\n\n"
    except TailserveError as error:
        yield b"data: " + encode(
            {"error": {"message": error.message, "type": "server_error", "param": None, "code": error.code}}
        )
        yield b"\n\n"
    else:
        if options is not None and options.include_usage:
            yield b"data: " + encode(form.envelope([], chunk=True) | {"usage": generation.usage()}) + b"\n\n"
    yield _DONE
