"""The `chat` command: a conversation in the terminal, with any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any, TextIO

from tailserve.cluster.settings import settings
from tailserve.engine.errors import ConfigError, TailserveError

SILENCE_S = 300.0
"""A server that says nothing for this long has gone."""
BROKEN = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError)
"""What comes of a server that is not there, goes away, or is none of OpenAI's kind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", help="the model to ask for (default: the first of /v1/models)")
    parser.add_argument("--api-key", default=settings().api_key, help="default: OPENAI_API_KEY")
    parser.add_argument("--slo-class", help="the class to be served in")
    parser.add_argument("--system", help="instructions that hold for the whole conversation")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=1024)


def run(args: argparse.Namespace) -> int:
    """Reads lines until the end of the input. Ctrl-C stops an answer, and leaves where none is under way."""
    # Line editing and a history, where the platform has them.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    chat = Chat(args, sys.stdout)
    sys.stdout.write(f"{chat.model} at {chat.url}; Ctrl-C stops an answer, Ctrl-D ends.\n")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return 0
        if text:
            try:
                chat.say(text)
            except TailserveError as error:
                sys.stdout.write(f"{error.message}\n")


class Chat:
    """One conversation."""

    def __init__(self, args: argparse.Namespace, out: TextIO) -> None:
        """ConfigError if nobody answers at the URL."""
        self.url = args.url.rstrip("/").removesuffix("/v1")
        self._args, self._out = args, out
        self._headers = {"Content-Type": "application/json", "X-Session-ID": uuid.uuid4().hex}
        if args.api_key:
            self._headers["Authorization"] = f"Bearer {args.api_key}"
        if args.slo_class:
            self._headers["X-SLO-Class"] = args.slo_class
        self._messages = [{"role": "system", "content": args.system}] if args.system else []
        self.model: str = args.model or self._first_model()

    def say(self, text: str) -> None:
        """One turn: prints the answer as it comes, and what it cost.

        TailserveError if the server refuses it, or is lost; the turn is forgotten then.
        """
        self._messages.append({"role": "user", "content": text})
        body = {
            "model": self.model,
            "messages": self._messages,
            "temperature": self._args.temperature,
            "max_tokens": self._args.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer, begin, first, stopped = "", time.monotonic(), None, False
        usage: dict[str, Any] = {}
        try:
            for event in self._events(body):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    if piece:
                        first = first or time.monotonic()
                        answer += piece
                        self._out.write(piece)
                        self._out.flush()
        except KeyboardInterrupt:
            # Leaving the connection has ended the request.
            stopped = True
        except TailserveError:
            self._messages.pop()
            raise
        if answer:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._messages.pop()
        self._out.write(f"\n({_facts(begin, first, usage, stopped=stopped)})\n")

    def _first_model(self) -> str:
        try:
            with urllib.request.urlopen(self._request("/v1/models"), timeout=10) as answer:
                model: str = json.load(answer)["data"][0]["id"]
                return model
        except urllib.error.HTTPError as error:
            raise ConfigError(f"{self.url}: {_message(error)}", param="url") from error
        except BROKEN as error:
            text = f"{self.url} does not answer GET /v1/models ({error}): is it the server's base URL?"
            raise ConfigError(text, param="url") from error

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with urllib.request.urlopen(self._request("/v1/chat/completions", body), timeout=SILENCE_S) as answer:
                for line in answer:
                    data = line.decode().strip().removeprefix("data:").strip()
                    if data and data != "[DONE]":
                        event = json.loads(data)
                        if "error" in event:
                            raise TailserveError(event["error"]["message"])
                        yield event
        except urllib.error.HTTPError as error:
            raise TailserveError(_message(error)) from error
        except BROKEN as error:
            raise TailserveError(f"the connection was lost: {error}") from error

    def _request(self, path: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.url + path, data, self._headers)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        message: str = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code}"
    wait = error.headers.get("Retry-After")
    return f"{message} (try again in {wait} s)" if wait else message


def _facts(begin: float, first: float | None, usage: dict[str, Any], *, stopped: bool) -> str:
    found = ["stopped"] if stopped else []
    if first is not None:
        found.append(f"first token after {1000 * (first - begin):.0f} ms")
        count = usage.get("completion_tokens", 0)
        if count > 1:
            found.append(f"{(count - 1) / max(time.monotonic() - first, 1e-9):.1f} tokens/s")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached:
        found.append(f"{cached} of {usage['prompt_tokens']} prompt tokens cached")
    return ", ".join(found) or "no answer"
