import random

import pytest

from tailserve.engine.cost import StepTimes
from tailserve.engine.types import ProfiledStep

PROFILE = [(1, 0.010), (8, 0.012), (32, 0.030)]


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepTimes().predict(4) is None


def test_between_sizes_it_interpolates() -> None:
    times = StepTimes([(8, 0.010), (16, 0.020)])
    assert times.predict(12) == pytest.approx(0.015)
    assert times.predict(8) == pytest.approx(0.010)


def test_a_profile_holds_until_steps_say_otherwise() -> None:
    times = StepTimes([(size, 0.01 + 0.0005 * size) for size in (1, 2, 4, 8, 16, 32, 64)])
    for _ in range(50):
        times.observe(8, 0.028)
    assert times.predict(8) == pytest.approx(0.028, rel=0.02)
    # What slowed one size down slowed the others down as well.
    assert times.predict(4) > 1.05 * 0.012  # type: ignore[operator]


def test_more_tokens_never_take_less_time() -> None:
    times = StepTimes([(size, 0.01) for size in (1, 2, 4, 8, 16)])
    for _ in range(20):
        times.observe(2, 0.05)
    predictions = [times.predict(n) for n in range(1, 17)]
    assert predictions == sorted(predictions)  # type: ignore[type-var]


def test_one_slow_step_does_not_count_for_all() -> None:
    times = StepTimes([(size, 0.01) for size in (1, 2, 4, 8, 16)])
    times.observe(1, 5.0)
    for _ in range(40):
        times.observe(1, 0.01)
    assert times.predict(1) < 0.02  # type: ignore[operator]


def test_noise_moves_no_size_that_does_not_run() -> None:
    """Steps that are mostly a little too fast and at times far too slow, and ones that only tell of rows that are gone."""
    times = StepTimes([(size, 0.01) for size in (1, 2, 4, 8, 16)])
    for n in range(600):
        times.observe(8, 0.04 if n % 12 == 0 else 0.0082)
        times.observe(0, 0.0001)
    assert times.predict(1) == pytest.approx(times.predict(8), rel=0.15)
    assert times.predict(1) > 0.0075  # type: ignore[operator]


def test_logits_and_context_have_costs_of_their_own() -> None:
    """Two kinds of steps of 64 tokens, and contexts from short to long."""
    times = StepTimes([(size, 0.01 + 0.001 * size) for size in (1, 8, 64, 128)])

    def seconds(unsampled: int, excess: int) -> float:
        return 0.01 + 0.001 * 64 - 0.0002 * unsampled + 1e-6 * excess

    for number in range(400):
        unsampled, excess = 63 * (number % 2), 5000 * (number % 5)
        times.observe(64, seconds(unsampled, excess), unsampled=unsampled, excess=excess)
    for unsampled, excess in ((0, 0), (63, 0), (0, 20_000), (63, 20_000)):
        assert times.predict(64, unsampled=unsampled, excess=excess) == pytest.approx(seconds(unsampled, excess), rel=0.05)
    assert times.errors()[0] < 0.02


def test_beyond_the_profile_it_goes_on_as_it_did() -> None:
    assert StepTimes([(8, 0.010), (16, 0.020)]).predict(32) == pytest.approx(0.040)


def test_a_million_odd_steps_leave_it_sane() -> None:
    """Rather a few thousand, on numbers that would show a filter that loses its footing."""
    times = StepTimes([(size, 0.01) for size in (1, 2, 4, 8, 16)])
    for number in range(5000):
        times.observe(1 + number % 3, 1e-6 if number % 7 else 10.0, unsampled=number % 2, excess=10**7 * (number % 2))
    assert 0 < (times.predict(1, excess=0) or 0) < 100


def test_steps_that_are_all_alike_spoil_nothing_for_others() -> None:
    """As many prompts beside as many answers, for minutes: only the sum of what tokens, logits and context cost shows."""

    def seconds(tokens: int, unsampled: int, excess: int) -> float:
        return 1.3 * (0.01 + 0.0007 * tokens - 0.00017 * unsampled + 1e-6 * excess)

    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    known = [*((size, 0.01 + 0.0007 * size) for size in sizes), (128, 0.0996 - 0.0216, 127)]
    times = StepTimes([ProfiledStep(*step) for step in (*known, (8, 0.0156 + 0.007, 0, 7000))])
    chance = random.Random(0)
    for _ in range(1000):
        excess = chance.randrange(1500, 2500)
        times.observe(55, seconds(55, 24, excess) * chance.gauss(1, 0.05), unsampled=24, excess=excess)
    for step in ((1, 0, 0), (128, 127, 0), (256, 254, 128), (32, 0, 8000)):
        assert times.predict(step[0], unsampled=step[1], excess=step[2]) == pytest.approx(seconds(*step), rel=0.15)
