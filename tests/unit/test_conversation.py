"""Turns of one conversation at the HTTP edge."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edge import MODEL, Edge
from fakes import VOCAB
from tokenizers import Tokenizer, models

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    """With a tokenizer that reads two characters as one token, wherever it can: no answer of single ones is read again as
    it was written."""
    edge = Edge(tmp_path)
    tokenizer: Tokenizer = edge.service._text.tokenizer
    single = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    pairs = [(first, second) for first in single[:VOCAB] for second in single[:VOCAB]]
    vocab = {token: index for index, token in enumerate([*single, *(first + second for first, second in pairs)])}
    tokenizer.model = models.BPE(vocab=vocab, merges=pairs)
    assert edge.service.model_info is not None
    edge.service.model_info = msgspec.structs.replace(edge.service.model_info, vocab_size=len(vocab))
    await edge.open()
    yield edge
    await edge.settle()
    await edge.close()


async def turn(edge: Edge, messages: list[Any], session_id: str | None) -> tuple[list[Any], int, int]:
    """The conversation with the answer; the prompt's tokens, and how many of them were found."""
    headers = {} if session_id is None else {"X-Session-ID": session_id}
    answer = await edge.client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, extra_headers=headers)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens or 0
    said = {"role": "assistant", "content": answer.choices[0].message.content}
    return [*messages, said, {"role": "user", "content": "more"}], answer.usage.prompt_tokens, cached


async def test_a_second_turn_finds_all_that_was_said(edge: Edge) -> None:
    messages, length, cached = await turn(edge, MESSAGES, "s")
    assert cached == 0
    messages, _, cached = await turn(edge, messages, "s")
    # Full blocks of four; the KV of the last token of an answer is never computed.
    assert cached == (length + 15) // 4 * 4


async def test_without_a_session_nothing_is_found(edge: Edge) -> None:
    messages, *_ = await turn(edge, MESSAGES, None)
    assert (await turn(edge, messages, None))[2] == 0
    assert (await turn(edge, messages, "s"))[2] == 0


async def test_a_deleted_session_is_not_found(edge: Edge) -> None:
    messages, length, _ = await turn(edge, MESSAGES, "s/1")
    response = await edge.http.delete("/v1/sessions/s/1")
    kept = (length + 15) // 4
    assert response.json() == {"id": "s/1", "object": "session", "deleted": True, "kv_blocks": kept}
    assert (await turn(edge, messages, "s/1"))[2] == 0
    assert (await edge.http.delete("/v1/sessions/unknown")).json()["kv_blocks"] == 0


async def test_an_answer_that_was_cut_is_read_again(edge: Edge) -> None:
    answer = await edge.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16)
    stop = (answer.choices[0].message.content or "")[6:9]
    body: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "extra_headers": {"X-Session-ID": "s"}}
    answer = await edge.client.chat.completions.create(**body, stop=stop)
    said = answer.choices[0].message.content
    again = [*MESSAGES, {"role": "assistant", "content": said}, {"role": "user", "content": "more"}]
    whole = await edge.http.post("/tokenize", json={"prompt": f"<user>hi<assistant>{said}<user>more<assistant>"})
    assert (await turn(edge, again, "s"))[1] == whole.json()["count"]


async def test_a_public_prefix_is_shared_by_strangers_and_nothing_behind_it(tmp_path: Path) -> None:
    edge = Edge(tmp_path, settings={"public_prefixes": ["You are a friendly assistant of the sea."]})
    await edge.open()
    system = {"role": "system", "content": "You are a friendly assistant of the sea."}
    public = len("<system>" + system["content"] + "<user>")
    asked = [[system, {"role": "user", "content": text}] for text in ("hello there", "hello there", "good day")]
    found = [(await turn(edge, messages, None))[2] for messages in asked]
    assert found == [0, public // 4 * 4, public // 4 * 4]
    other = {"role": "system", "content": "You are a friendly assistant of mine, and no other."}
    alone = [(await turn(edge, [other, MESSAGES[0]], None))[2] for _ in range(2)]
    # What they have in common with what is public.
    assert alone == [len("<system>You are a friendly assistant of ") // 4 * 4] * 2
    plain = [await edge.client.completions.create(model=MODEL, prompt=system["content"] + rest) for rest in (" One", " Two")]
    usage = plain[1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == len(system["content"]) // 4 * 4
    await edge.settle()
    await edge.close()
