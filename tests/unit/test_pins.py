"""What is kept of sessions between their turns. A block has two tokens."""

from __future__ import annotations

import random

import pytest
from fakes import FakeExecutor, engine_config, make_request

from tailserve.engine.blocks import chain_hash, root_hash
from tailserve.engine.engine import Engine
from tailserve.engine.sequence import PUBLIC_SCOPE


class Chat:
    """An engine of 16 blocks with a clock of its own."""

    def __init__(self, **config: object) -> None:
        sizes: dict[str, object] = {"num_blocks": 16, "block_size": 2, "max_model_len": 32, "max_num_seqs": 4}
        self.now = 0.0
        settings = engine_config(**(sizes | config))
        self.engine = Engine(settings, FakeExecutor(settings), clock=lambda: self.now)

    @property
    def pins(self) -> int:
        return self.engine.scheduler.pins.num_blocks

    def turn(
        self, session_id: str | None, prompt: list[int], num_output: int = 2, tenant: str = ""
    ) -> tuple[list[int], int]:
        """All tokens of a turn, and how many of its prompt were found."""
        scope = f"{tenant}/{session_id}" if session_id else None
        request = make_request(prompt, max_tokens=num_output, session_id=session_id, scope=scope, tenant=tenant)
        self.engine.add(request)
        tokens, cached = list(prompt), 0
        while self.engine.has_work:
            for chunk in self.engine.step():
                tokens += chunk.token_ids
                cached = chunk.usage.cached_tokens
        self.engine.check_integrity()
        return tokens, cached


def test_a_session_is_found_again_after_others_have_used_the_whole_cache() -> None:
    chat = Chat()
    said, _ = chat.turn("a", [1, 2, 3, 4])
    alone, _ = chat.turn(None, [1, 2, 3, 4])
    for seed in range(8):
        chat.turn(None, [seed + 10] * 20)
    assert chat.turn("a", [*said, 5])[1] == 4
    assert chat.turn(None, [*alone, 5])[1] == 0


def test_what_is_kept_too_long_is_kept_no_longer() -> None:
    chat = Chat(session_ttl_s=5.0)
    said, _ = chat.turn("a", [1, 2, 3, 4])
    assert chat.pins == 2
    chat.now = 6.0
    chat.turn(None, [9])
    assert chat.pins == 0
    # Nobody needed its blocks.
    assert chat.turn("a", [*said, 5])[1] == 4


def test_sessions_with_short_pauses_are_kept_for_a_short_time() -> None:
    chat = Chat(session_ttl_s=1000.0)
    said: list[int] = [1]
    for _ in range(8):
        said, _ = chat.turn("a", said)
        chat.now += 1.0
    chat.now += 20.0
    chat.turn(None, [9])
    assert chat.pins == 0


def test_pins_delay_nobody() -> None:
    """All blocks but a few are pinned, and a request needs most of them."""
    chat = Chat(session_share=1.0)
    for name in "abcdefg":
        chat.turn(name, [ord(name)] * 4)
    assert chat.pins == 14
    tokens, _ = chat.turn(None, [7] * 26)
    assert len(tokens) == 28
    assert chat.turn("g", [ord("g")] * 5)[1] == 4
    assert chat.turn("a", [ord("a")] * 5)[1] == 0


def test_no_tenant_pins_more_than_its_share() -> None:
    chat = Chat(session_share=0.5)
    first, _ = chat.turn("one", [1] * 4, tenant="quiet")
    for name in "abcdefgh":
        chat.turn(name, [ord(name)] * 4, tenant="loud")
    assert chat.pins == 2 + 4
    for seed in range(4):
        chat.turn(None, [seed + 10] * 18)
    assert chat.turn("one", [*first, 5], tenant="quiet")[1] == 4


def test_a_deleted_session_is_found_by_nobody() -> None:
    chat = Chat()
    said, _ = chat.turn("a", [1, 2, 3, 4])
    other, _ = chat.turn("a", [1, 2, 3, 4], tenant="b")
    assert chat.engine.drop_session("", "a") == 2
    assert chat.engine.drop_session("", "a") == 0
    chat.engine.check_integrity()
    assert chat.pins == 2
    assert chat.turn("a", [*said, 5])[1] == 0
    assert chat.turn("a", [*other, 5], tenant="b")[1] == 4


@pytest.mark.parametrize("seed", range(5))
def test_every_block_is_accounted_for_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    chat = Chat(session_share=chance.choice([0.2, 1.0]), session_ttl_s=5.0)
    engine = chat.engine
    open_requests: list[str] = []
    for _ in range(300):
        chat.now += chance.random()
        match chance.randrange(6):
            case 0:
                session_id = chance.choice("abc")
                prompt = [ord(session_id)] * chance.randrange(1, 12)
                request = make_request(prompt, max_tokens=chance.randrange(1, 6), session_id=session_id, scope=session_id)
                engine.add(request)
                open_requests.append(request.id)
            case 1 if open_requests:
                engine.abort(open_requests.pop(chance.randrange(len(open_requests))))
            case 2:
                engine.drop_session("", chance.choice("abc"))
            case _:
                engine.step()
        engine.check_integrity()


def test_what_is_public_outlives_the_sessions_that_begin_with_it() -> None:
    chat = Chat()
    for session_id in ("a", "b"):
        request = make_request([1, 2, 3, 4, 5, 6], max_tokens=2, session_id=session_id, scope=session_id, num_public=4)
        chat.engine.add(request)
        while chat.engine.has_work:
            chat.engine.step()
    assert chat.pins == 2
    assert chat.engine.drop_session("", "a") == 1
    assert len(chat.engine.scheduler.residency.pool.match(chat_hashes())) == 2


def chat_hashes() -> list[bytes]:
    first = chain_hash(root_hash(PUBLIC_SCOPE), [1, 2])
    return [first, chain_hash(first, [3, 4])]


def test_a_turn_that_ends_after_its_session_was_deleted_leaves_nothing() -> None:
    chat = Chat()
    request = make_request([1, 2, 3, 4], max_tokens=6, session_id="a", scope="/a")
    chat.engine.add(request)
    for _ in range(3):
        chat.engine.step()
    chat.engine.drop_session("", "a")
    while chat.engine.has_work:
        chat.engine.step()
    assert chat.pins == 0
    assert chat.turn("a", [1, 2, 3, 4, 5])[1] == 0
