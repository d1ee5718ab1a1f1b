"""Whose turn it is among tenants of one class."""

from tailserve.engine.fairness import FairShares


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
    shares = FairShares()
    (first, charge), second, third = (shares.enter("a", 1000, 100) for _ in range(3))
    shares.start(first)
    # It ends early and gives most of its charge back.
    shares.end("a", charge, 10, 0)
    assert first < second[0] < third[0] <= shares.enter("a", 10, 100)[0]


def test_who_sends_ten_times_as_much_gets_the_same_while_both_wait() -> None:
    shares = FairShares()
    waiting = []
    for tenant in ["loud"] * 100 + ["quiet"] * 10:
        tag, charge = shares.enter(tenant, 100, 50)
        waiting.append((tag, tenant, charge))
    order = serve(shares, waiting, 20)
    assert order.count("quiet") >= 9


def test_who_was_away_has_saved_nothing_up() -> None:
    shares = FairShares()
    waiting = [(tag, "a", charge) for tag, charge in (shares.enter("a", 100, 50) for _ in range(50))]
    serve(shares, waiting, 40)
    waiting += [(tag, "b", charge) for tag, charge in (shares.enter("b", 100, 50) for _ in range(10))]
    order = serve(shares, waiting, 10)
    assert 4 <= order.count("b") <= 6


def test_short_answers_are_charged_as_such() -> None:
    shares = FairShares()
    tag, charge = shares.enter("a", 10, 1000)
    shares.start(tag)
    shares.end("a", charge, 10, 1)
    assert shares.enter("a", 10, 1000)[0] < charge / 2
