"""How many tokens to draft and to verify, against costs and chances that the test sets."""

import itertools
import random

import pytest
from fakes import NORMAL, Answers, FakeExecutor, InlineDrafter, TimedExecutor, engine_config, make_request
from msgspec.structs import replace

from tailserve.engine.cost import StepTimes
from tailserve.engine.engine import Engine
from tailserve.engine.speculation.acceptance import Acceptance, OwnRecord
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork
from tailserve.engine.speculation.policy import FIRST_REST, TRIAL, DraftPolicy

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def times(base: float, per_token: float) -> StepTimes:
    return StepTimes([(size, base + per_token * size) for size in SIZES])


def test_the_choice_is_the_best_of_all_choices() -> None:
    """Against every combination of prefixes, on small random batches."""
    chance = random.Random(0)
    for _ in range(60):
        cost = times(0.01, chance.choice([0.0001, 0.001, 0.003, 0.008]))
        survivals = {
            row: list(itertools.accumulate([chance.uniform(0.2, 0.95) for _ in range(3)], lambda a, b: a * b))
            for row in range(3)
        }

        drafts = {row: [chances] for row, chances in survivals.items()}

        def rate(counts: dict[int, int], cost: StepTimes = cost, survivals: dict[int, list[float]] = survivals) -> float:
            expected = 3 + sum(sum(survivals[row][:count]) for row, count in counts.items())
            return expected / (cost.predict(3 + sum(counts.values())) or 1)

        chosen = {row: counts[0] for row, counts in DraftPolicy(cost).choose(3, 3, drafts).items()}
        best = max(rate(dict(enumerate(counts))) for counts in itertools.product(range(4), repeat=3))
        # The costs are interpolated between sizes, so the best is a prefix of the sorted offers but for their corners.
        assert rate(chosen) > 0.98 * best


def test_cheap_tokens_are_all_verified_and_dear_ones_not_at_all() -> None:
    survivals = {0: [[0.9, 0.8]], 1: [[0.5, 0.2], [0.3]]}
    assert DraftPolicy(times(0.01, 0.0)).choose(2, 2, survivals) == {0: [2], 1: [2, 1]}
    assert DraftPolicy(times(0.0, 0.01)).choose(2, 2, survivals) == {0: [0], 1: [0, 0]}


@pytest.mark.parametrize(("chance", "taken"), [(0.25, 0), (0.5, 1)])
def test_a_branch_must_bring_what_two_tokens_cost(chance: float, taken: int) -> None:
    """A token costs a fifth of a step here, so that 0.4 tokens must come of a branch of one, and more once others did."""
    assert DraftPolicy(times(0.01, 0.0025)).choose(1, 1, {0: [[], [chance]]}) == {0: [0, taken]}


def test_without_known_costs_everything_is_verified() -> None:
    assert DraftPolicy(StepTimes()).choose(1, 1, {0: [[0.1, 0.1], [0.1]]}) == {0: [2, 1]}


@pytest.mark.parametrize(("count", "expected"), [(8, [128, 256, 512, 1024]), (1, [TRIAL] * 4)])
def test_drafting_rests_where_it_does_not_pay_and_longer_each_time_but_for_one(count: int, expected: list[int]) -> None:
    policy = DraftPolicy(times(0.01, 0.0))
    rests = []
    for _ in range(4):
        for _ in range(TRIAL):
            assert policy.pays(count)
            policy.note_step(count, count, 0.02 * count, 0.01, drafted=True)
        assert policy.pays(4), "what does not pay for eight may pay for four"
        assert policy.pays(64) == (count == 1), "what does not pay for eight does not for more"
        steps = 0
        while not policy.pays(count):
            policy.note_step(count, count, 0.0101, 0.01, drafted=False)
            steps += 1
        rests.append(steps)
    assert rests == expected


def test_drafting_goes_on_where_it_pays() -> None:
    policy = DraftPolicy(times(0.01, 0.0))
    for _ in range(100):
        policy.note_step(8, 16, 0.015, 0.012, drafted=True)
        assert policy.pays(8)


def test_a_lone_newcomer_gets_a_trial_of_its_own() -> None:
    policy = DraftPolicy(times(0.01, 0.0))
    for _ in range(TRIAL):
        policy.note_step(1, 1, 0.02, 0.01, drafted=True)
    assert not policy.pays(1)
    policy.note_arrival(1)
    assert policy.pays(1)


def test_confidence_is_what_it_turns_out_to_be() -> None:
    acceptance = Acceptance()
    boasting = Draft(10, [1], [0.95], kind="model")
    for turn in range(400):
        acceptance.observe(boasting, 1, turn % 2, OwnRecord())
    assert acceptance.survivals(boasting, OwnRecord())[0] == pytest.approx(0.5, abs=0.05)
    assert acceptance.survivals(Draft(10, [1], [0.95], kind="other"), OwnRecord())[0] > 0.9


def test_survival_is_a_product() -> None:
    chances = Acceptance().survivals(Draft(10, [1, 2, 3], [0.85, 0.55, 0.25]), OwnRecord())
    assert chances == pytest.approx([0.85, 0.85 * 0.55, 0.85 * 0.55 * 0.25])


def test_a_sequence_that_fares_worse_is_expected_to() -> None:
    acceptance, record = Acceptance(), OwnRecord()
    draft = Draft(10, [1, 2], [0.8, 0.8])
    before = acceptance.survivals(draft, record)[0]
    for _ in range(20):
        acceptance.observe(draft, 2, 0, record)
    assert acceptance.survivals(draft, record)[0] < before / 2
    # What lies behind the first wrong token says nothing.
    record = OwnRecord()
    acceptance.observe(draft, 2, 0, record)
    assert record.expected < 5


@pytest.mark.parametrize(("per_token", "pays"), [(0.00001, True), (0.01, False)])
def test_an_engine_speculates_by_itself_where_it_pays(per_token: float, pays: bool) -> None:
    classes = engine_config().classes
    config = engine_config(
        classes=tuple(replace(slo, speculation="auto") for slo in classes),
        max_model_len=400,
        num_blocks=800,
        max_num_batched_tokens=64,
        step_profile=tuple((size, 0.01 + per_token * size) for size in SIZES),
    )
    executor = TimedExecutor(config, 0.01, per_token)
    engine = Engine(config, executor, InlineDrafter(oracle=pays), clock=lambda: executor.now)
    for n in range(3):
        engine.add(make_request([n + 1, n + 2], max_tokens=300))
    answers = Answers()
    while engine.has_work:
        answers.take(engine.step())
    drafted = [batch for batch in executor.batches if batch.drafts]
    if pays:
        assert len(executor.batches) < 60, "nine tokens a step"
    else:
        assert len(drafted) < len(executor.batches) / 10


def test_a_trial_that_shows_nothing_is_no_failure() -> None:
    policy = DraftPolicy(times(0.01, 0.0))
    for _ in range(2):
        for _ in range(2 * TRIAL):
            assert policy.pays(8)
            policy.note_mixed_step(8, drafted=True)
        assert not policy.pays(8)
        assert policy.pays(32)
        for _ in range(FIRST_REST):
            policy.note_mixed_step(8, drafted=False)


def test_a_pause_does_not_make_drafts_look_better() -> None:
    policy = DraftPolicy(times(0.01, 0.0))
    policy.note_step(1, 1, 5.0, 0.01, drafted=False)
    for _ in range(TRIAL):
        policy.note_step(1, 1, 0.02, 0.01, drafted=True)
    assert not policy.pays(1)


@pytest.mark.parametrize("by_chance", [False, True])
def test_a_draft_by_chance_is_verified_as_far_as_it_goes(by_chance: bool) -> None:
    """To choose among its tokens by what they turned out to be would change what answers are likely."""

    class Unlikely:
        incarnation = 0

        def send(self, work: DraftWork) -> bool:
            self.work = work
            return True

        def receive(self, number: int, timeout_s: float) -> DraftResult:
            candidates = [([1, 2], [0.5, 0.5])] * 2 if by_chance else []
            drafts = {
                row.row: Draft(row.keep + len(row.token_ids), [1, 2], [0.03, 0.03], candidates) for row in self.work.rows
            }
            return DraftResult(number, drafts)

    settings = engine_config(
        classes=(replace(NORMAL, speculation="auto"),),
        step_profile=tuple((size, 0.01 * size) for size in (1, 2, 4, 8, 16, 32)),
    )
    executor = FakeExecutor(settings)
    engine = Engine(settings, executor, Unlikely())
    engine.add(make_request([5, 6], max_tokens=20, temperature=1.0))
    for _ in range(3):
        engine.step()
    assert any(batch.drafts for batch in executor.batches) == by_chance
