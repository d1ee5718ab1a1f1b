"""Whose turn it is among tenants of one class."""

import pytest
from timed import CRITICAL, Run, add_all, generating

from tailserve.engine.fairness import FairShares, Turn
from tailserve.engine.types import SloClass


def serve(shares: FairShares, waiting: list[tuple[Turn, str]], count: int) -> list[str]:
    """The tenants of the next `count` requests that run, each of 100 prompt and 50 output tokens."""
    order = []
    for _ in range(count):
        waiting.sort()
        turn, tenant = waiting.pop(0)
        shares.start(turn.tag)
        shares.end(tenant, turn, 100, 50)
        order.append(tenant)
    return order


def test_one_tenant_is_served_in_order() -> None:
    shares = FairShares(256)
    first, second, third = (shares.enter("a", 1000, 100) for _ in range(3))
    shares.start(first.tag)
    # It ends early and gives most of its charge back.
    shares.end("a", first, 10, 0)
    assert first.tag < second.tag < third.tag <= shares.enter("a", 10, 100).tag


def test_who_sends_ten_times_as_much_gets_the_same_while_both_wait() -> None:
    shares = FairShares(256)
    waiting = [(shares.enter(tenant, 100, 50), tenant) for tenant in ["loud"] * 100 + ["quiet"] * 10]
    order = serve(shares, waiting, 20)
    assert order.count("quiet") >= 9


def test_who_was_away_has_saved_nothing_up() -> None:
    shares = FairShares(256)
    waiting = [(shares.enter("a", 100, 50), "a") for _ in range(50)]
    serve(shares, waiting, 40)
    waiting += [(shares.enter("b", 100, 50), "b") for _ in range(10)]
    order = serve(shares, waiting, 10)
    assert 4 <= order.count("b") <= 6


def test_short_answers_are_charged_as_such() -> None:
    shares = FairShares(256)
    turn = shares.enter("a", 10, 1000)
    shares.start(turn.tag)
    shares.end("a", turn, 10, 1)
    assert shares.enter("a", 10, 1000).tag < turn.charge / 2


def test_a_burst_is_nobodys_fault_and_more_than_one_is() -> None:
    shares = FairShares(64)
    burst = [shares.enter("a", 100, 50) for _ in range(8)]
    more = [shares.enter("a", 100, 50) for _ in range(4)]
    others = [shares.enter("b", 100, 50) for _ in range(8)]
    assert not any(turn.over for turn in burst + others)
    assert all(turn.over for turn in more)
    for turn in burst + more[:3]:
        shares.start(turn.tag)
        shares.end("a", turn, 100, 50)
    assert shares.enter("a", 100, 50).over, "one that came before is, still"
    shares.end("a", more[3], 100, 50)


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
