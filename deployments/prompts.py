"""From what a request says to the tokens of its prompts, with no other request's tokens held up meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tailserve.deployments.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, too_long
from tailserve.deployments.text import TextModel
from tailserve.deployments.turns import Turns
from tailserve.engine.errors import InvalidRequestError
from tailserve.engine.types import ModelInfo

LONG_TEXT = 8192
"""Characters, or tokens, of one request from which a thread turns them into the other."""


class Prompts:
    """A model's tokens of texts, and texts of tokens. InvalidRequestError for more than the model's context holds."""

    def __init__(self, text: TextModel, turns: Turns) -> None:
        """`turns`: answers that conversations may go on from."""
        self._text = text
        self._turns = turns

    async def of_chat(self, body: ChatBody, scope: str | None, info: ModelInfo) -> tuple[str, list[tuple[int, ...]]]:
        """A conversation's text, and its tokens as the one prompt; those of earlier answers as they were generated."""
        text = self._text.render_chat([message.for_template() for message in body.messages])
        said, token_ids = self._turns.find(scope, text)
        (rest,) = await self._encode([text[len(said) :]], info, add_special_tokens=False)
        return text, [_checked((*token_ids, *rest), info)]

    async def of_completion(self, body: CompletionBody, info: ModelInfo) -> list[tuple[int, ...]]:
        """Those of each prompt."""
        prompts = body.prompts()
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        found = iter(await self._encode(texts, info, add_special_tokens=True))
        return [_checked(next(found) if isinstance(prompt, str) else prompt, info) for prompt in prompts]

    async def tokenize(self, body: TokenizeBody, info: ModelInfo) -> dict[str, Any]:
        """The answer of POST /tokenize."""
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        if body.messages is not None:
            text = self._text.render_chat([message.for_template() for message in body.messages])
            (tokens,) = await self._encode([text], info, add_special_tokens=False)
        else:
            (tokens,) = await self._encode([body.prompt or ""], info, add_special_tokens=body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": info.max_model_len}

    async def detokenize(self, body: DetokenizeBody, info: ModelInfo) -> dict[str, Any]:
        """The answer of POST /detokenize."""
        if max(body.tokens, default=0) >= info.vocab_size:
            raise InvalidRequestError(f"tokens must be below {info.vocab_size}", param="tokens")
        if len(body.tokens) < LONG_TEXT:
            return {"prompt": self._text.decode(body.tokens, skip_special_tokens=False)}
        return {"prompt": await asyncio.to_thread(self._text.decode, body.tokens, skip_special_tokens=False)}

    async def _encode(self, texts: list[str], info: ModelInfo, *, add_special_tokens: bool) -> list[list[int]]:
        for text in texts:
            least = len(text) // self._text.max_token_chars
            if least >= info.max_model_len:
                raise too_long(f"at least {least}", info.max_model_len)

        def encode() -> list[list[int]]:
            return [self._text.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        return encode() if sum(map(len, texts)) < LONG_TEXT else await asyncio.to_thread(encode)


def _checked(prompt: Sequence[int], info: ModelInfo) -> tuple[int, ...]:
    """The prompt, if the model can read it and has room for a token of an answer; else InvalidRequestError."""
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens: give some text", param="prompt")
    if len(prompt) >= info.max_model_len:
        raise too_long(str(len(prompt)), info.max_model_len)
    if max(prompt) >= info.vocab_size:
        raise InvalidRequestError(f"prompt token ids must be below {info.vocab_size}", param="prompt")
    return tuple(prompt)
