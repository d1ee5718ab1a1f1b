"""The request bodies of OpenAI's API, with the extensions that servers of open models share."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from tailserve.engine.errors import InvalidRequestError
from tailserve.engine.types import SamplingParams

UNSUPPORTED: dict[str, list[Any]] = {
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "reasoning_effort": ["none"],
    "reasoning": [{}, {"effort": None}, {"effort": None, "summary": None}],
    "verbosity": ["medium"],
    "web_search_options": [],
    "repetition_detection": [],
    "echo": [False],
    "suffix": [""],
    "best_of": [1],
}
"""Fields of the API that are not built yet, with the values that ask for nothing. Others are refused, not ignored."""

MAX_MESSAGES = 4096
"""Of one conversation."""
MAX_PROMPTS = 64
"""Of one request."""
Body = TypeVar("Body", bound=BaseModel)
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted, without effect."""
    continuous_usage_stats: bool = False


class GenerationBody(Strict):
    """What both completion routes take."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=16)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    user: str | None = Field(default=None, max_length=256)
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    # Extensions.
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    ignore_eos: bool = False
    early_stop: bool = True
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: list[_TokenId] = Field(default=[], max_length=64)
    priority: int | None = None
    request_id: str | None = Field(default=None, min_length=1, max_length=128)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    session_id: str | None = Field(default=None, min_length=1, max_length=256)
    prompt_cache_key: str | None = Field(default=None, min_length=1, max_length=256)
    # Accepted, without effect here.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    response_format: dict[str, str] | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def wanted_tokens(self) -> int | None:
        """The client's own limit on output tokens."""
        raise NotImplementedError

    def top_logprobs_count(self) -> int | None:
        """How many alternatives to report at each token; None for no logprobs at all."""
        raise NotImplementedError

    def sampling(
        self, *, max_tokens: int, eos_token_ids: tuple[int, ...], vocab_size: int, watch_end: bool = False
    ) -> SamplingParams:
        """The engine's parameters; a seed is made up when the client gave none. `watch_end`: see there."""
        logprobs = self.top_logprobs_count()
        if self.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}, above the {max_tokens} tokens this answer may have", param="min_tokens"
            )
        if any(token_id >= vocab_size for token_id in self.stop_token_ids):
            raise InvalidRequestError(f"stop_token_ids must be below {vocab_size}", param="stop_token_ids")
        return SamplingParams(
            max_tokens=max_tokens,
            seed=secrets.randbits(64) if self.seed is None else self.seed % 2**64,
            # Below this the distribution is a single token, and float32 runs out.
            temperature=self.temperature if self.temperature >= 1e-5 else 0.0,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            min_tokens=self.min_tokens,
            eos_token_ids=() if self.ignore_eos else eos_token_ids,
            stop_token_ids=tuple(self.stop_token_ids),
            logprobs=0 if watch_end and logprobs is None else logprobs,
            watch_end=watch_end,
        )


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    # Parts of an answer that a client sends back as history; nothing of them reaches the template.
    refusal: str | None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    store: Literal[False] | None = None
    """Accepted, without effect."""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def top_logprobs_count(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    store: Literal[False] | None = None
    """Accepted, without effect."""
    prompt: str | list[_TokenId] | Annotated[list[str] | list[list[_TokenId]], Field(max_length=MAX_PROMPTS)]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def top_logprobs_count(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: text, or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequestError("prompt is empty: give text or token ids", param="prompt")
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [entry for entry in prompt if not isinstance(entry, int)]


class TokenizeBody(Strict):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[_TokenId]


class AbortBody(Strict):
    """POST /abort_request"""

    request_id: str = Field(min_length=1)


def parse_body(kind: type[Body], data: bytes, *, context: int | None = None) -> Body:
    """Checks a JSON body. InvalidRequestError names the first wrong field and what it would accept.

    `context`: tokens that the model's context holds; longer lists of token ids are refused unread.
    """
    fields = read_object(data)
    if context is not None:
        check_counts(fields, context)
    return check_fields(kind, fields)


def check_counts(fields: dict[str, Any], limit: int) -> None:
    """InvalidRequestError for lists of token ids that no context holds, before each of them is looked at.

    `limit`: the context's tokens; a list of as many is told by whoever knows what else goes into it.
    """
    for name in ("prompt", "tokens"):
        value = fields.get(name)
        if isinstance(value, list):
            longest = max([len(value), *(len(entry) for entry in value[:MAX_PROMPTS] if isinstance(entry, list))])
            if longest > limit:
                raise too_long(str(longest), limit, param=name)


def too_long(num_tokens: str, limit: int, param: str = "prompt") -> InvalidRequestError:
    """The refusal of a prompt of so many tokens."""
    return InvalidRequestError(
        f"the prompt has {num_tokens} tokens; the context holds {limit}, the answer included: shorten the prompt",
        param=param,
        code="context_length_exceeded",
    )


def read_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object's fields. InvalidRequestError if it is something else."""
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object", code="invalid_json")
    return fields


def check_fields(kind: type[Body], fields: dict[str, Any]) -> Body:
    """A body of these fields. InvalidRequestError as in `parse_body`."""
    for name in fields.keys() & UNSUPPORTED.keys():
        if fields[name] is not None and fields[name] not in UNSUPPORTED[name]:
            raise InvalidRequestError(f"{name} is not supported yet", param=name, code="unsupported_parameter")
        del fields[name]
    # In OpenAI's API null is as good as absent.
    fields = {name: value for name, value in fields.items() if value is not None or name not in kind.model_fields}
    if fields.get("response_format") not in (None, {"type": "text"}):
        message = "response_format is not supported yet, but for text"
        raise InvalidRequestError(message, param="response_format", code="unsupported_parameter")
    try:
        # From JSON again: strictness knows that JSON has no tuples and enumerations.
        return kind.model_validate_json(msgspec.json.encode(fields))
    except ValidationError as error:
        problem = _plainest(error)
        field = ".".join(str(part) for part in problem["loc"] if not _UNION_BRANCH.search(str(part)))
        if problem["type"] == "extra_forbidden":
            raise InvalidRequestError(f"unknown field {field}", param=field, code="unknown_parameter") from None
        raise InvalidRequestError(f"{field}: {problem['msg']}", param=field, code="invalid_value") from None


_UNION_BRANCH = re.compile(r"\[|\(|^(constrained-)?(str|int|list)$")
"""Parts of pydantic's error locations that name a type of a union, not a field."""


def _plainest(error: ValidationError) -> ErrorDetails:
    """Of a union's errors, that of a branch whose type was right: it says what was wrong inside."""
    problems = error.errors(include_url=False)
    same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    return next((problem for problem in same_field if not problem["type"].endswith("_type")), problems[0])
