"""Whose turn it is among tenants of one class."""

import pytest
from timed import CRITICAL, Run, add_all, generating

from tailserve.engine.fairness import FairShares
from tailserve.engine.types import SloClass


def serve(shares: FairShares, waiting: list[tuple[float, str, float]], count: int) -> list[str]:
    """The tenants of the next `count` requests that run, each of 100 prompt and 50 output tokens."""
    order = []
    for _ in range(count):
        waiting.sort()
        tag, tenant, charge = waiting.pop(0)
        shares.start(tag)
        shares.end(tenant, charge, 100, 50)
        order.append(tenant)
    return order


def test_one_tenant_is_served_in_order() -> None:
    shares = FairShares(64)
    (first, charge), second, third = (shares.enter("a", 1000, 100) for _ in range(3))
    shares.start(first)
    # It ends early and gives most of its charge back.
    shares.end("a", charge, 10, 0)
    assert first < second[0] < third[0] <= shares.enter("a", 10, 100)[0]


def test_who_sends_ten_times_as_much_gets_the_same_while_both_wait() -> None:
    shares = FairShares(64)
    waiting = []
    for tenant in ["loud"] * 100 + ["quiet"] * 10:
        tag, charge = shares.enter(tenant, 100, 50)
        waiting.append((tag, tenant, charge))
    order = serve(shares, waiting, 20)
    assert order.count("quiet") >= 9


def test_who_was_away_has_saved_nothing_up() -> None:
    shares = FairShares(64)
    waiting = [(tag, "a", charge) for tag, charge in (shares.enter("a", 100, 50) for _ in range(50))]
    serve(shares, waiting, 40)
    waiting += [(tag, "b", charge) for tag, charge in (shares.enter("b", 100, 50) for _ in range(10))]
    order = serve(shares, waiting, 10)
    assert 4 <= order.count("b") <= 6


def test_short_answers_are_charged_as_such() -> None:
    shares = FairShares(64)
    tag, charge = shares.enter("a", 10, 1000)
    shares.start(tag)
    shares.end("a", charge, 10, 1)
    assert shares.enter("a", 10, 1000)[0] < charge / 2


def test_credit_is_a_burst_and_comes_back_with_what_others_are_served() -> None:
    shares = FairShares(64)
    first = [shares.enter("a", 100, 50) for _ in range(100)]
    other = [shares.enter("b", 100, 50) for _ in range(4)]
    # A burst is 16 usual requests. These are of 200 tokens; 256 were guessed.
    assert 16 * 200 < shares.burst == shares.credit("c") < 16 * 256
    assert shares.credit("a") == pytest.approx((16 - 100) * 200, abs=16 * 56)
    for _, charge in first:
        shares.end("a", charge, 100, 50)
    # Half of what was served is not enough; but of the debt no more than a burst is left.
    assert shares.credit("a") == -shares.burst
    assert shares.credit("b") == shares.burst
    before = shares.credit("a")
    shares.end("b", other[0][1], 100, 50)
    assert shares.credit("a") == before + 200


@pytest.mark.parametrize("limit", ["slots", "cap"])
def test_a_burst_gets_the_places_of_a_tenant_that_sends_more_and_more(limit: str) -> None:
    tight = SloClass(name="normal", priority=10, ttft_s=5.0, tpot_s=0.05, speculation="off")
    run = Run(max_num_seqs=16) if limit == "slots" else Run(max_num_seqs=64, classes=(CRITICAL, tight))
    loud = add_all(run, "normal", 60, 4, 400, tenant="loud")
    run.run(lambda: run.now > 2)
    quiet = add_all(run, "normal", 2, 4, 20, tenant="quiet")
    run.run(generating(run, quiet))
    assert all(run.ttft(request) < 0.3 for request in quiet)
    assert not all(run.times[request.id] for request in loud)
    run.run()
    assert all(len(run.times[request.id]) == 400 for request in loud)


def test_many_who_come_at_once_find_places_though_those_that_gave_them_up_are_first_in_line() -> None:
    run = Run()
    loud = add_all(run, "normal", 200, 4, 100, tenant="loud")
    run.run(lambda: run.now > 1)
    assert run.engine.gauges().num_running == 64
    quiet = [request for name in "abc" for request in add_all(run, "normal", 24, 4, 10, tenant=name)]
    run.run(generating(run, quiet))
    assert max(run.ttft(request) for request in quiet) < 3
    run.run()
    assert all(len(run.times[request.id]) == 100 for request in loud)


@pytest.mark.parametrize("more", [0, 40])
def test_who_gave_up_its_place_does_not_find_it_again_before_others_had_it(more: int) -> None:
    """Steps read one prompt at a time; with `more` of the loud tenant in line, and without."""
    run = Run(max_num_batched_tokens=96)
    loud = add_all(run, "normal", 64 + more, 4, 150, tenant="loud")
    run.run(generating(run, loud[:64]))
    quiet = add_all(run, "normal", 10, 200, 10, tenant="quiet")
    run.run(generating(run, quiet))
    assert run.engine.stats.preemptions <= 10
    run.run()
    assert all(len(run.times[request.id]) == 150 for request in loud)


@pytest.mark.parametrize("tenant", ["quiet", "loud"])
def test_prompts_of_a_tenant_that_sends_too_much_leave_others_more_than_they_can_just_bear(tenant: str) -> None:
    run = Run(classes=(CRITICAL, SloClass(name="normal", priority=10, ttft_s=5.0, tpot_s=0.1, speculation="off")))
    first = add_all(run, "normal", 4, 4, 60, tenant=tenant)
    run.run(generating(run, first))
    loud = add_all(run, "normal", 60, 300, 4, tenant="loud")
    run.run(lambda: all(len(run.times[request.id]) == 60 for request in first))
    # They can bear 80 ms.
    pace = max(run.tpot(request) for request in first)
    assert (pace < 0.87 * 0.08) == (tenant == "quiet"), f"{pace:.3f} s a token"
    run.run()
    assert all(len(run.times[request.id]) == 4 for request in loud)


def test_where_all_are_in_debt_nobody_is() -> None:
    shares = FairShares(64)
    charges = [shares.enter("a", 100, 50)[1] for _ in range(100)]
    assert shares.debtors == frozenset()
    shares.enter("b", 100, 50)
    assert shares.debtors == {"a"}
    for charge in charges:
        shares.end("a", charge, 100, 50)
    assert shares.debtors == frozenset()
