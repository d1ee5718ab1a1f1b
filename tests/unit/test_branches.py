"""Several drafts for one place: what the engine makes of them, on fakes, and what drafters propose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fakes import NORMAL, FakeExecutor, engine_config, expected_answer, make_request, run_to_end
from local import Models
from msgspec.structs import replace

from tailserve.engine.engine import Engine
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.options import BRANCH_TOKENS, MAX_BRANCHES
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftRow, DraftWork, StateMessage, with_others
from tailserve.engine.speculation.ngram import NgramDrafter


class ForkedDrafter:
    """The right draft among wrong ones, which begin with other tokens."""

    incarnation = 0

    def __init__(self, place: int, width: int = 4, go_on: Callable[[list[int], int], list[int]] = expected_answer) -> None:
        self._place, self._width, self._go_on = place, width, go_on
        self._tokens: dict[int, list[int]] = {}

    def send(self, work: DraftWork) -> bool:
        self._result = DraftResult(work.number, {row.row: self._draft(row) for row in work.rows})
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult:
        return self._result

    def _draft(self, row: DraftRow) -> Draft:
        tokens = self._tokens[row.row] = self._tokens.get(row.row, [])[: row.keep] + row.token_ids
        right = self._go_on(tokens, row.num_tokens)
        wrong = [[(right[0] + 1 + n) % 50, *right[1:]] for n in range(self._width - 1)]
        drafts = [Draft(len(tokens), draft, kind="fake") for draft in wrong]
        drafts.insert(self._place, Draft(len(tokens), right, kind="fake"))
        return with_others(drafts, self._width)


def run(drafter: ForkedDrafter, prompts: list[list[int]], **config: object) -> tuple[Engine, FakeExecutor]:
    settings = engine_config(max_num_batched_tokens=128, draft_branches=4, **config)
    executor = FakeExecutor(settings)
    engine = Engine(settings, executor, drafter)
    requests = [make_request(prompt, max_tokens=24) for prompt in prompts]
    for request in requests:
        engine.add(request)
    answers = run_to_end(engine)
    for request, prompt in zip(requests, prompts, strict=True):
        assert answers.tokens[request.id] == expected_answer(prompt, 24)
    engine.check_integrity()
    return engine, executor


@pytest.mark.parametrize("place", [0, 1, 3])
def test_whichever_draft_is_right_it_counts(place: int) -> None:
    engine, executor = run(ForkedDrafter(place), [[3, 1, 4], [1, 5, 9, 2, 6], [7]])
    steps = [batch for batch in executor.batches if batch.branches]
    assert len(executor.batches) < 12, "24 tokens, four of them in each step"
    assert all(len(row) == 3 for batch in steps for row in batch.branches.values() if len(batch.rows) == 3)
    held = engine.stats.accepted_by_kind
    assert held["fake" if place == 0 else "fake beside"] == engine.stats.accepted_draft_tokens > 40
    # Several branches are one draft, of which at each place at most one token holds.
    by_position = engine.stats.accepted_by_position
    assert sum(by_position) == engine.stats.accepted_draft_tokens
    assert by_position == sorted(by_position, reverse=True)
    assert by_position[0] <= engine.stats.drafts <= 3 * engine.stats.steps


def test_a_step_has_so_many_branches_and_no_more() -> None:
    _, executor = run(ForkedDrafter(2), [[n] for n in range(8)], max_num_seqs=8)
    most = max(sum(map(len, batch.branches.values())) for batch in executor.batches)
    assert most == MAX_BRANCHES


def test_branches_take_no_block_that_somebody_needs() -> None:
    preemptions = [
        run(ForkedDrafter(0, width), [[n] * 9 for n in range(6)], num_blocks=17)[0].stats.preemptions for width in (1, 4)
    ]
    assert preemptions[1] <= preemptions[0]


def test_auto_verifies_only_branches_that_pay() -> None:
    """Steps of one token more take as long again here: no branch is worth two."""
    auto = (replace(NORMAL, speculation="auto"),)
    profile = tuple((size, 0.001 * size) for size in (1, 2, 4, 8, 16, 32))
    _, executor = run(ForkedDrafter(3), [[5, 6]], classes=auto, step_profile=profile)
    assert not any(batch.branches for batch in executor.batches)


def test_others_begin_differently_and_are_short() -> None:
    first, same, other = (Draft(3, [token] * 12, [0.5] * 12, kind="a") for token in (1, 1, 2))
    draft = with_others([first, same, other], 4)
    assert draft.token_ids == first.token_ids
    assert draft.others == [Draft(3, [2] * BRANCH_TOKENS, [0.5] * BRANCH_TOKENS, kind="a beside")]
    assert with_others([draft, *draft.others], 2).others[0].kind == "a beside"


def test_ngrams_propose_what_followed_earlier_occurrences() -> None:
    row = DraftRow(1, 0, [5, 6, 7, 0, 5, 6, 8, 1, 5, 6, 9, 2, 5, 6], 2, width=3)
    draft = NgramDrafter().run(DraftWork(0, 0, [row], [])).drafts[1]
    assert [draft.token_ids, *(other.token_ids for other in draft.others)] == [[9, 2], [8, 1], [7, 0]]


def test_the_states_of_a_branch_that_holds_are_its_own(tiny_llama: str) -> None:
    """Answers are the same whatever is verified, so the draft must get the same states for them."""
    models = Models(tiny_llama, num_blocks=100, block_size=8)
    models.paged.tap((0, 2))
    slo = (replace(NORMAL, speculation=4),)
    prompt = [5, 9, 30, 31, 7, 44, 2]

    def run(drafter: object) -> tuple[list[int], np.ndarray, Engine]:
        states: dict[int, bytes] = {}
        tokens: dict[int, int] = {}

        def take(message: StateMessage) -> None:
            for row in message.rows:
                size = len(row.data) // len(row.next_tokens)
                for n, token in enumerate(row.next_tokens):
                    states[row.start + n] = row.data[n * size : (n + 1) * size]
                    tokens[row.start + n] = token

        config = engine_config(classes=slo, max_model_len=128, num_blocks=100, block_size=8, draft_branches=4)
        engine = Engine(config, LocalExecutor(models.paged, publish=take, num_blocks=100), drafter)  # type: ignore[arg-type]
        engine.add(make_request(prompt, max_tokens=30))
        (answer,) = run_to_end(engine).tokens.values()
        places = range(len(prompt) + 27)
        assert [tokens[place] for place in places] == (prompt + answer)[1 : len(places) + 1]
        raw = b"".join(states[place] for place in places)
        return answer, (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32), engine

    # A wrong draft of one token: states flow, nothing is accepted.
    answer, expected, _ = run(ForkedDrafter(0, 1, lambda tokens, count: [(tokens[-1] + 1) % 40]))
    whole = prompt + answer
    same, found, engine = run(ForkedDrafter(2, 4, lambda tokens, count: [*whole[len(tokens) :], 1][:count]))
    assert same == answer
    assert engine.stats.accepted_by_kind["fake beside"] > 15
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)
