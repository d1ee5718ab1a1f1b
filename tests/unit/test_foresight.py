"""Pre-speculation: what is prepared is what would have been drafted, and changes no answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fakes import Answers, make_request, run_to_end
from local import Models, prompts
from tiny import TINY

from tailserve.engine.model.draft import ModelDrafter
from tailserve.engine.model.spans import Span
from tailserve.engine.speculation.drafter import Draft, DraftRow, DraftWork, Outcome, OutcomeRow
from tailserve.engine.speculation.foresight import Foresight, fan_out
from tailserve.engine.stats import EngineStats

VOCAB = TINY["vocab_size"]


@pytest.fixture(scope="module")
def models(tiny_llama: str) -> Models:
    return Models(tiny_llama, num_blocks=200, block_size=8)


def test_outcomes_go_where_acceptance_is_likely_to_end() -> None:
    assert sum(fan_out([0.9, 0.5, 0.4], 8)) == 8
    assert fan_out([0.9, 0.8, 0.7], 1) == [0, 0, 0, 1]
    counts = fan_out([0.5, 0.45, 0.4], 6)
    assert counts[0] > counts[1]
    assert counts[3] > counts[2]
    assert fan_out([], 3) == [3]


def test_the_table_is_good_for_one_step() -> None:
    stats = EngineStats()
    foresight, drafts = Foresight(stats), [Draft(3, [7]), Draft(4, [8])]
    foresight.fill([Outcome(1, 9, drafts[0])])
    assert foresight.look_up(1, [1, 2, 9]) == drafts[0]
    assert foresight.look_up(1, [1, 2, 8]) is None
    assert foresight.look_up(2, [1, 2, 9]) is None
    foresight.fill([Outcome(1, 9, drafts[1])])
    assert foresight.look_up(1, [1, 2, 9]) is None
    assert foresight.look_up(1, [1, 2, 3, 9]) == drafts[1]
    assert (stats.foresight_hits, stats.foresight_misses, stats.foreseen_drafts) == (2, 3, 2)


@pytest.mark.parametrize("known", [5, 8, 15, 16])
def test_what_is_prepared_is_what_would_have_been_drafted(models: Models, known: int) -> None:
    tokens = list(range(7, 7 + known))

    def drafter() -> ModelDrafter:
        return ModelDrafter(models.paged, max_num_batched_tokens=128, max_model_len=200)

    first = drafter()
    draft = first.run(DraftWork(0, 0, [DraftRow(1, 0, tokens, 3)], [])).drafts[1]
    free = first._pool.num_free
    asked = DraftWork(1, 1, [DraftRow(1, known, [], 3)], [], outcomes=[OutcomeRow(1, draft.token_ids, [2, 1, 2, 3])])
    outcomes = first.run(asked).outcomes
    assert len(outcomes) == 8
    assert first._pool.num_free >= free - 1, "branches give their blocks back"
    for outcome in outcomes:
        accepted = outcome.draft.base_len - known - 1
        if accepted < len(draft.token_ids):
            assert outcome.token_id != draft.token_ids[accepted]
        then = [*tokens, *draft.token_ids[:accepted], outcome.token_id]
        fresh = drafter().run(DraftWork(0, 0, [DraftRow(1, 0, then, 3)], [])).drafts[1]
        assert (fresh.base_len, fresh.token_ids) == (outcome.draft.base_len, outcome.draft.token_ids)
    # And the row goes on as if nothing had been prepared.
    then = [*draft.token_ids[:1], 90]
    again = first.run(DraftWork(2, 2, [DraftRow(1, known, then, 3)], [])).drafts[1]
    fresh = drafter().run(DraftWork(0, 0, [DraftRow(1, 0, tokens + then, 3)], [])).drafts[1]
    assert again.token_ids == fresh.token_ids


@pytest.mark.parametrize("draft", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_it(models: Models, draft: float, temperature: float) -> None:
    wanted = [
        make_request(prompt, id=str(n), seed=n, max_tokens=24, temperature=temperature)
        for n, prompt in enumerate(prompts(8, VOCAB))
    ]
    runs = []
    for outcomes in (0, 6):
        engine = models.engine(draft, num_outcomes=outcomes)
        for request in wanted:
            engine.add(request)
        runs.append(run_to_end(engine).tokens)
    assert runs[0] == runs[1]
    stats = engine.stats
    assert stats.foresight_hits > 0
    if draft == temperature == 0.0:
        # What always agrees ends in the bonus token, and the likeliest one is prepared for.
        assert stats.foresight_misses < stats.foresight_hits / 4
    engine.check_integrity()


def test_long_prompts_are_read_beside_rows_whose_drafts_are_prepared(models: Models) -> None:
    """In parts, and never more tokens than a round may have."""
    engine, most = models.engine(0.0, num_outcomes=6), 0
    draft_model = models._drafts[0.0][0]
    forward = draft_model.forward

    def counted(spans: Sequence[Span]) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(len(span.token_ids) for span in spans))
        return forward(spans)

    draft_model.forward = counted  # type: ignore[method-assign]
    try:
        engine.add(make_request([5, 6, 7], id="short", max_tokens=150))
        answers = Answers()
        for _ in range(4):
            answers.take(engine.step())
        for name, length in (("a", 50), ("b", 50), ("long", 110)):
            engine.add(make_request([3 + n % 50 for n in range(length)], id=name, max_tokens=24))
        run_to_end(engine, answers)
    finally:
        draft_model.forward = forward  # type: ignore[method-assign]
    assert all(answers.ends[name].usage.accepted_draft_tokens > 10 for name in ("a", "b", "long"))
    assert most <= 64
