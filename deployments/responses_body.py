"""The body of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from tailserve.deployments.openai import MAX_MESSAGES, ChatBody, GenerationBody, Strict
from tailserve.engine.errors import InvalidRequestError


class ItemPart(Strict):
    type: Literal["input_text", "output_text"]
    text: str
    # Of an answer that is sent back as history.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(Strict):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ItemPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def message(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class TextFormat(Strict):
    type: Literal["text"]


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(GenerationBody):
    """POST /v1/responses"""

    input: str | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = Field(default=None, max_length=128)
    max_output_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[str] = Field(default=[], max_length=16)
    """What other answers than ours have is left out."""
    store: bool = True
    n: Literal[1] = 1
    background: bool | None = None
    """The response goes on without its reader."""
    # Accepted where they ask for nothing.
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    max_tool_calls: int | None = None

    def items(self) -> tuple[dict[str, str], ...]:
        """What this turn adds to the conversation."""
        if isinstance(self.input, str):
            return ({"role": "user", "content": self.input},)
        if not self.input:
            raise InvalidRequestError("input is empty: give text or messages", param="input")
        return tuple(item.message() for item in self.input)

    def as_chat(self, history: Sequence[dict[str, str]], session_id: str | None) -> ChatBody:
        """The chat that this turn of a conversation is. InvalidRequestError if it has too many messages."""
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields = self.model_dump(include=GenerationBody.model_fields.keys() - {"n", "stream", "stream_options"})
        wants_logprobs = bool(self.top_logprobs) or "message.output_text.logprobs" in self.include
        messages = [*instructions, *history, *self.items()]
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"the conversation has {len(messages)} messages, at most {MAX_MESSAGES} are allowed", param="input"
            )
        return ChatBody.model_validate(
            fields
            | {
                "messages": messages,
                "max_completion_tokens": self.max_output_tokens,
                "logprobs": wants_logprobs,
                "top_logprobs": (self.top_logprobs or 0) if wants_logprobs else None,
                "session_id": session_id,
            }
        )
