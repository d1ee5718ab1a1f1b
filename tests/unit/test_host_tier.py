"""The second tier of KV blocks, as the engine sees it. A block has two tokens; the stand-in for the verifier reads what it
computes from the blocks that were moved, so a wrong move makes a wrong answer."""

from __future__ import annotations

from collections import Counter

import pytest
from fakes import VOCAB, Answers, FakeExecutor, engine_config, expected_answer, make_request, run_to_end

from tailserve.engine.engine import Engine
from tailserve.engine.host_tier import HostTier
from tailserve.engine.types import Request


class Chat:
    """An engine of 16 blocks, and what it was told."""

    def __init__(self, num_host_blocks: int, **config: object) -> None:
        sizes: dict[str, object] = {"num_blocks": 16, "block_size": 2, "max_model_len": 32, "max_num_seqs": 4}
        self.now = self.tick = 0.0
        settings = engine_config(**(sizes | {"num_host_blocks": num_host_blocks} | config))
        self.executor = FakeExecutor(settings)
        self.engine = Engine(settings, self.executor, clock=self.clock)

    def clock(self) -> float:
        self.now += self.tick
        return self.now

    @property
    def host(self) -> HostTier:
        return self.engine.scheduler.residency.host

    def turn(
        self, session_id: str | None, prompt: list[int], num_output: int = 2, **fields: object
    ) -> tuple[list[int], int]:
        """All tokens of a turn, and how many of its prompt were found."""
        request = make_request(prompt, max_tokens=num_output, session_id=session_id, scope=session_id, **fields)
        self.engine.add(request)
        answers = run_to_end(self.engine)
        self.engine.check_integrity()
        tokens = answers.tokens[request.id]
        assert tokens == expected_answer(prompt, num_output)
        return [*prompt, *tokens], answers.ends[request.id].usage.cached_tokens

    def use_all_blocks(self) -> None:
        for seed in range(3):
            self.turn(None, [seed + 20] * 28)


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def test_what_a_session_loses_on_the_device_comes_back() -> None:
    chat = Chat(16, session_share=0.0)
    said, _ = chat.turn("a", PROMPT)
    chat.use_all_blocks()
    assert chat.turn("a", [*said, 5])[1] == 8
    assert chat.engine.stats.host_cache_hits == 8
    assert chat.turn(None, [*said, 5])[1] == 0


def test_without_it_the_session_is_computed_again() -> None:
    chat = Chat(0, session_share=0.0)
    said, _ = chat.turn("a", PROMPT)
    chat.use_all_blocks()
    assert chat.turn("a", [*said, 5])[1] == 0


def test_what_nobody_keeps_is_not_moved() -> None:
    chat = Chat(16)
    chat.use_all_blocks()
    assert chat.engine.stats.moved_blocks == 0


def test_sessions_beyond_the_room_of_both_tiers_go_oldest_first() -> None:
    chat = Chat(8, session_share=0.0)
    said = {name: chat.turn(name, [ord(name), *PROMPT])[0] for name in "abc"}
    chat.use_all_blocks()
    assert chat.turn("c", [*said["c"], 5])[1] == 10
    assert chat.turn("a", [*said["a"], 5])[1] == 0


def test_no_tenant_takes_anothers_part_of_it() -> None:
    chat = Chat(16, session_share=0.0)
    said, _ = chat.turn("a", PROMPT, tenant="quiet")
    for number in range(8):
        chat.turn(f"b{number}", [number + 10, *PROMPT], tenant="loud")
    chat.use_all_blocks()
    assert chat.turn("a", [*said, 5], tenant="quiet")[1] == 8


def test_what_is_public_before_a_session_is_kept_with_it() -> None:
    chat = Chat(16, session_share=0.0)
    said, _ = chat.turn("a", PROMPT, num_public=4)
    chat.use_all_blocks()
    assert chat.turn("a", [*said, 5], num_public=4)[1] == 8


def beside_a_critical_one(chat: Chat, *, max_tokens: int) -> tuple[Request, Answers]:
    """What was kept is on the host only, and a critical request generates."""
    for seed in range(4):
        chat.turn(None, [seed + 20] * 60)
    critical = make_request([1, 2], max_tokens=max_tokens, slo_class="critical")
    chat.engine.add(critical)
    answers = Answers()
    for _ in range(3):
        answers.take(chat.engine.step())
    return critical, answers


def test_a_large_load_takes_many_steps_beside_a_critical_sequence() -> None:
    chat = Chat(64, num_blocks=48, max_model_len=64, session_share=0.0)
    chat.executor.move_s, chat.tick = 0.01, 0.001
    said, _ = chat.turn("a", list(range(40)))
    critical, answers = beside_a_critical_one(chat, max_tokens=60)
    before = len(chat.executor.batches)
    turn = make_request([*said, 5], max_tokens=2, session_id="a", scope="a")
    chat.engine.add(turn)
    run_to_end(chat.engine, answers)
    chat.engine.check_integrity()
    loads = [sum(not move.to_host for move in batch.moves) for batch in chat.executor.batches[before:]]
    assert sum(loads) == 20
    # A critical token may take 40 ms.
    assert max(loads) <= 2
    assert answers.ends[turn.id].usage.cached_tokens == 40
    assert answers.tokens[turn.id] == expected_answer([*said, 5], 2)
    assert answers.tokens[critical.id] == expected_answer([1, 2], 60)


def test_what_is_still_to_be_loaded_has_its_blocks_already() -> None:
    """Else both sessions would start, for one of which there is room, and displace each other."""
    chat = Chat(128, num_blocks=48, max_model_len=64, session_share=0.0)
    chat.executor.move_s, chat.tick = 0.01, 0.001
    said = [chat.turn(name, [ord(name) % VOCAB] * 56)[0] for name in "ab"]
    _, answers = beside_a_critical_one(chat, max_tokens=24)
    before = chat.engine.stats.preemptions
    turns = [
        make_request([*tokens, 5], max_tokens=2, session_id=name, scope=name)
        for name, tokens in zip("ab", said, strict=True)
    ]
    for turn in turns:
        chat.engine.add(turn)
    while chat.engine.has_work:
        answers.take(chat.engine.step())
        chat.engine.check_integrity()
    assert chat.engine.stats.preemptions == before
    assert [answers.ends[turn.id].usage.cached_tokens for turn in turns] == [56, 56]
    for turn in turns:
        assert answers.tokens[turn.id] == expected_answer(turn.prompt_token_ids, 2)


def test_of_a_chain_the_last_blocks_give_way_first() -> None:
    host, chain = HostTier(4), [b"0", b"1", b"2", b"3"]
    host.keep([*chain, b"new"])
    for block in (3, 2, 1, 0):
        host.save(block, chain[block])
    host.touch(chain)
    host.save(9, b"new")
    assert [content in host for content in chain] == [True, True, True, False]
    # What leaves the device now was used later than what left it before.
    host.save(1, b"1")
    host.keep([b"newer"])
    host.save(9, b"newer")
    assert [content in host for content in chain] == [True, True, False, False]


def test_a_deleted_session_is_in_neither_tier() -> None:
    chat = Chat(16, session_share=0.0)
    said, _ = chat.turn("a", PROMPT)
    chat.use_all_blocks()
    assert chat.host.usage == 4 / 16
    assert chat.engine.drop_session("", "a") == 4
    assert chat.host.usage == 0
    assert chat.turn("a", [*said, 5])[1] == 0


def test_what_is_kept_too_long_is_kept_no_longer() -> None:
    chat = Chat(16, session_share=0.0, session_ttl_s=50.0)
    chat.turn("a", PROMPT)
    chat.use_all_blocks()
    chat.now = 51.0
    chat.turn(None, [9])
    assert chat.host.usage == 0


def test_a_lost_verifier_takes_its_host_memory_along() -> None:
    chat = Chat(16, session_share=0.0)
    said, _ = chat.turn("a", PROMPT)
    chat.use_all_blocks()
    chat.executor.fail_next = 1
    chat.turn(None, [9])
    assert chat.turn("a", [*said, 5])[1] == 0


def test_a_displaced_sequence_finds_its_tokens_again() -> None:
    chat = Chat(16, num_blocks=16)
    displaced = make_request(PROMPT, max_tokens=20)
    chat.engine.add(displaced)
    for _ in range(12):
        chat.engine.step()
    chat.engine.add(make_request([9] * 26, max_tokens=4, slo_class="critical"))
    tokens = run_to_end(chat.engine)
    chat.engine.check_integrity()
    assert chat.engine.stats.preemptions == 1
    assert chat.engine.stats.host_cache_hits > 8
    assert tokens.ends[displaced.id].usage.cached_tokens == 0
    assert chat.host.usage == 0


def test_a_move_out_of_a_place_comes_before_a_later_move_into_it() -> None:
    host = HostTier(1)
    host.keep([b"old", b"new"])
    host.save(3, b"old")
    assert host.load(b"old", 4)
    host.save(5, b"new")
    assert [(move.block, move.host_block, move.to_host) for move in host.take_moves()] == [
        (3, 0, True),
        (4, 0, False),
        (5, 0, True),
    ]
    assert not host.load(b"old", 6)
    host.check_integrity(Counter([b"old", b"new"]))


def test_integrity_names_what_is_kept_by_nobody() -> None:
    host = HostTier(2)
    host.keep([b"a"])
    host.save(0, b"a")
    with pytest.raises(AssertionError, match="those who keep it"):
        host.check_integrity(Counter())
