"""A speculative prefix: the first tokens of an answer are the draft's alone, and the verifier goes on behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import NORMAL, Answers, FakeExecutor, engine_config, expected_answer, make_request, run_to_end
from local import Models, prompts
from msgspec.structs import replace
from tiny import TINY

from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.deployments.draft_kinds import plan_draft
from tailserve.deployments.generation import Choice
from tailserve.deployments.text import Detokenizer, StopStrings
from tailserve.engine.engine import Engine
from tailserve.engine.errors import ConfigError
from tailserve.engine.options import EAGLE_MODEL_TYPE, LoadOptions
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork
from tailserve.engine.types import StepResult, TokenChunk, Usage

PREFIX = replace(NORMAL, speculative_prefix=3, speculation="off")
WRITTEN = [11, 12, 13]


class Writer:
    """A draft that writes the same whenever it is asked, in its so many-th round."""

    incarnation = 0

    def __init__(self, rounds: int = 1, tokens: list[int] = WRITTEN) -> None:
        self._rounds, self._tokens = rounds, tokens
        self.asked: list[DraftWork] = []

    def send(self, work: DraftWork) -> bool:
        self.asked.append(work)
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        drafts = {}
        if self._rounds and len(self.asked) >= self._rounds:
            drafts = {row.row: Draft(0, self._tokens[: row.num_tokens]) for row in self.asked[-1].rows}
        return DraftResult(number, drafts) if self._rounds else None


class PunctualExecutor(FakeExecutor):
    """Its step ends however long one waits."""

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        return super().poll()


def run(writer: Writer, prompt: list[int], **fields: object) -> tuple[list[TokenChunk], Engine]:
    config = engine_config(classes=(PREFIX,))
    engine = Engine(config, PunctualExecutor(config), writer)
    engine.add(make_request(prompt, **fields))
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    engine.check_integrity()
    return chunks, engine


@pytest.mark.parametrize(("length", "rounds"), [(2, 1), (9, 1), (50, 1), (50, 2)])
def test_the_first_chunk_is_the_drafts_and_the_rest_follows_from_it(length: int, rounds: int) -> None:
    prompt = list(range(length))
    chunks, engine = run(Writer(rounds), prompt)
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert list(chunks[0].token_ids) == WRITTEN
    assert tokens == WRITTEN + expected_answer(prompt + WRITTEN, 5)
    assert chunks[-1].usage.prefix_tokens == engine.stats.prefix_tokens == 3


@pytest.mark.parametrize("why", ["late", "one token", "logprobs", "penalty"])
def test_answers_are_the_verifiers_where_there_is_no_prefix(why: str) -> None:
    prompt = [5] if why == "one token" else [5, 6, 7]
    fields: dict[str, object] = {"logprobs": {"logprobs": 0}, "penalty": {"presence_penalty": 0.5}}.get(why, {})  # type: ignore[assignment]
    chunks, engine = run(Writer(rounds=0 if why == "late" else 1), prompt, **fields)
    assert [token for chunk in chunks for token in chunk.token_ids] == expected_answer(prompt, 8)
    assert chunks[-1].usage.prefix_tokens == 0


def test_a_prompt_that_is_cached_but_for_its_last_token_waits_for_nobody() -> None:
    config = engine_config(classes=(PREFIX,))
    engine = Engine(config, PunctualExecutor(config), Writer())
    prompt = list(range(9))
    for count in (3, 0):
        request = make_request(prompt, scope="shared")
        engine.add(request)
        assert run_to_end(engine).ends[request.id].usage.prefix_tokens == count


def test_the_draft_ends_no_answer() -> None:
    writer = Writer(tokens=[11, 9, 13])
    chunks, _ = run(writer, [1, 2, 3], eos_token_ids=(9,))
    assert chunks[0].token_ids == (11,)
    chunks, _ = run(writer, [1, 2, 3], max_tokens=2)
    assert [token for chunk in chunks for token in chunk.token_ids] == [11, *expected_answer([1, 2, 3, 11], 1)]


def test_others_go_on_meanwhile_and_a_displaced_one_keeps_its_prefix() -> None:
    config = engine_config(classes=(replace(PREFIX, name="critical", priority=0), PREFIX), max_num_seqs=2)
    engine = Engine(config, PunctualExecutor(config), Writer())
    wanted = [make_request([n, n + 1, n + 2], max_tokens=12) for n in range(3)]
    for request in wanted:
        engine.add(request)
    answers = Answers()
    for _ in range(6):
        answers.take(engine.step())
    urgent = make_request([7, 8], slo_class="critical", max_tokens=4)
    engine.add(urgent)
    answers = run_to_end(engine, answers)
    assert engine.stats.preemptions > 0
    for request in (*wanted, urgent):
        prompt, count = list(request.prompt_token_ids), request.sampling.max_tokens
        assert answers.tokens[request.id] == WRITTEN + expected_answer(prompt + WRITTEN, count - 3)
    engine.check_integrity()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_real_draft_writes_it(tiny_llama: str, temperature: float) -> None:
    """The draft has the verifier's weights here, and draws from its likeliest tokens: it writes what it would draft."""
    models = Models(tiny_llama, num_blocks=200, block_size=8)
    engine = models.engine(0.0, classes=(replace(PREFIX, speculative_prefix=5),))
    plain = models.engine()
    for n, prompt in enumerate(prompts(8, TINY["vocab_size"], longest=100)):
        for each in (engine, plain):
            each.add(make_request(prompt, id=str(n), seed=n, temperature=temperature, max_tokens=12))
    answers = run_to_end(engine)
    prefixes = {name: end.usage.prefix_tokens for name, end in answers.ends.items()}
    assert sum(count == 5 for count in prefixes.values()) >= 4
    if temperature == 0:
        assert answers.tokens == run_to_end(plain).tokens


def test_pieces_say_which_of_them_the_draft_wrote() -> None:
    text = Detokenizer(lambda ids, **_: "".join(chr(97 + token) for token in ids))
    choice = Choice(0, make_request([1]), text, StopStrings([]))
    pieces = [choice.take(TokenChunk("a", tokens, usage=Usage(prefix_tokens=2))) for tokens in ((1, 2), (3,))]
    assert [piece is not None and piece.speculative_prefix for piece in pieces] == [True, False]


def _with_prefix(draft_model: str) -> TailserveConfig:
    slo = {"name": "normal", "priority": 0, "ttft_s": 1, "tpot_s": 1, "speculative_prefix": 4}
    tiers = dict.fromkeys(("auto", "default", "flex", "priority"), "normal")
    return parse_config({"draft_model": draft_model, "slo_classes": [slo], "urgent_class": "normal", "service_tiers": tiers})


@pytest.mark.parametrize("draft", ["ngram", "none"])
def test_a_class_that_wants_one_needs_a_draft_model(draft: str) -> None:
    with pytest.raises(ConfigError, match="needs a draft model"):
        _with_prefix(draft)


def test_a_head_cannot_write_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{EAGLE_MODEL_TYPE}", "feature_layers": [0]}}')
    with pytest.raises(ConfigError, match="a head cannot"):
        plan_draft(_with_prefix(str(tmp_path)), LoadOptions(path="x"), "/tmp")
