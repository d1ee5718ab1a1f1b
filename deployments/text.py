"""Text at the edge: tokenizer, chat template, and streams of text that never split a character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tailserve.engine.errors import ConfigError, InvalidRequestError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()

MAX_HELD_TOKENS = 3
"""An incomplete character has at most three bytes, hence tokens. A longer tail that is no character never will be one."""


class TextModel:
    """A model directory's tokenizer, template and end-of-sequence tokens, without transformers."""

    def __init__(self, directory: Path) -> None:
        if not (directory / "tokenizer.json").is_file():
            raise ConfigError(
                f"{directory} has no tokenizer.json: make one with transformers' AutoTokenizer.from_pretrained(...)."
                "save_pretrained(...)",
                param="model",
            )
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._config = _read_json(directory / "tokenizer_config.json")
        template = directory / "chat_template.jinja"
        self._template = template.read_text() if template.is_file() else _default_template(self._config)
        self.eos_token_ids = _eos_token_ids(directory)

    @cached_property
    def max_token_chars(self) -> int:
        """Length of the longest token: a text of n characters has at least n / this many tokens."""
        return max(len(token) for token in self.tokenizer.get_vocab())

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def reads_in_parts(self) -> bool:
        """Whether what follows a text reads the same by itself: some tokenizers put a space in front of every text."""
        return self.encode("a\n" + "b", add_special_tokens=False) == [
            token for part in ("a\n", "b") for token in self.encode(part, add_special_tokens=False)
        ]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, which need not be whole characters."""
        token: str = self.tokenizer.id_to_token(token_id) or ""
        if self._byte_level and all(char in _BYTES for char in token):
            return bytes(_BYTES[char] for char in token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self.tokenizer.to_str())["decoder"])

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text of a conversation. InvalidRequestError with the template's own words where it refuses."""
        try:
            text: str = self._compiled.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return text

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        found = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = self._config.get(name)
            if value is not None:
                found[name] = value["content"] if isinstance(value, dict) else value
        return found

    @cached_property
    def _compiled(self) -> Any:
        if not isinstance(self._template, str):
            raise InvalidRequestError("this model has no chat template: use /v1/completions", param="messages")
        # As transformers renders templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self._template)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _default_template(config: dict[str, Any]) -> Any:
    """Some models have several templates, by name."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return data


def _eos_token_ids(directory: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(directory / name).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


class Detokenizer:
    """Turns a growing list of tokens into text, piece by piece, never splitting a character.

    Decodes from a little before the last emitted token, because what a token reads as may depend on its neighbour (a space
    in front of a word, say), and holds tokens back while their bytes are no complete character yet.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], behind: Sequence[int] = ()) -> None:
        """`behind`: the tokens in front, where the text goes on from theirs. What they read as is no part of it."""
        self._decode = decode
        # Behind half a character its rest would be lost.
        self._ids = [] if decode(behind).endswith("\ufffd") else list(behind)
        self._context = 0
        self._begin = self._emitted = len(self._ids)

    @property
    def token_ids(self) -> list[int]:
        """All that were pushed."""
        return self._ids[self._begin :]

    def push(self, token_ids: Sequence[int], *, final: bool = False) -> str:
        """The text that these tokens complete. With `final`, everything that is left."""
        self._ids += token_ids
        end = len(self._ids) - (0 if final else self._incomplete())
        before = self._decode(self._ids[self._context : self._emitted])
        text = self._decode(self._ids[self._context : end])
        if end > self._emitted:
            self._context, self._emitted = self._emitted, end
        return text[len(before) :]

    def _incomplete(self) -> int:
        """How many tokens at the end are the beginning of a character."""
        total = len(self._ids)
        for held in range(min(MAX_HELD_TOKENS, total - self._emitted) + 1):
            if not self._decode(self._ids[self._context : total - held]).endswith("\ufffd"):
                return held
        return min(MAX_HELD_TOKENS, total - self._emitted)


class StopStrings:
    """Finds which of several strings is complete first in streamed text, and holds back what may become one.

    Where two are complete at the same character the longer one counts. So the result does not depend on how the text comes
    in pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._stops)

    def push(self, text: str, *, final: bool = False) -> tuple[str, str | None]:
        """What may be shown now, and the stop string that was found, if any (the text then ends before it)."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(index + len(stop), index, stop) for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            _, index, stop = min(found)
            self._held = ""
            return text[:index], stop
        keep = 0 if final else self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _possible_start(self, text: str) -> int:
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
