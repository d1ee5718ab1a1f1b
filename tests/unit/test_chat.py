"""The terminal's chat, against the edge."""

from __future__ import annotations

import argparse
import asyncio
import io
from typing import Any

import pytest
from edge import Edge

from tailserve.deployments import chat
from tailserve.engine.errors import ConfigError, TailserveError


def arguments(edge: Edge | None, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    args = parser.parse_args([str(edge.http.base_url) if edge else "http://127.0.0.1:1"])
    return argparse.Namespace(**(vars(args) | {"temperature": 0.0, "max_tokens": 8} | more))


async def test_a_second_turn_has_the_first_before_it(edge: Edge) -> None:
    out = io.StringIO()
    talk = await asyncio.to_thread(chat.Chat, arguments(edge), out)
    assert talk.model == "tiny"
    await asyncio.to_thread(talk.say, "hi")
    first = out.getvalue().split("\n")[0]
    messages: Any = [{"role": "user", "content": "hi"}]
    expected = await edge.client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert first == expected.choices[0].message.content
    await asyncio.to_thread(talk.say, "more")
    assert "prompt tokens cached" in out.getvalue().splitlines()[-1]


async def test_what_is_refused_is_no_turn(edge: Edge) -> None:
    talk = await asyncio.to_thread(chat.Chat, arguments(edge, slo_class="vip"), io.StringIO())
    with pytest.raises(TailserveError, match="X-SLO-Class is 'vip'"):
        await asyncio.to_thread(talk.say, "hi")
    assert talk._messages == []


async def test_ctrl_c_ends_the_request_and_not_the_chat(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    edge.calls.executor.step_s = 0.02
    out = io.StringIO()
    talk = await asyncio.to_thread(chat.Chat, arguments(edge, max_tokens=80), out)
    events = talk._events

    def interrupted(body: dict[str, Any]) -> Any:
        for place, event in enumerate(events(body)):
            if place == 5:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(talk, "_events", interrupted)
    await asyncio.to_thread(talk.say, "hi")
    assert "(stopped" in out.getvalue()
    await edge.settle()
    assert edge.calls.engine.stats.generated_tokens < 40
    assert [message["role"] for message in talk._messages] == ["user", "assistant"]


def test_nobody_there_is_said_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="is it the server's base URL"):
        chat.Chat(arguments(None), io.StringIO())
