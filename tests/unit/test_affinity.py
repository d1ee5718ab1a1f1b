"""Where sessions go."""

from collections import Counter

from tailserve.cluster.affinity import FRESH_S, Loads, choose_instance

IDLE = {"a": 0, "b": 0, "c": 0, "d": 0}


def test_sessions_stay_where_they_are_and_are_spread_evenly() -> None:
    homes = Counter(choose_instance(f"s{number}", IDLE) for number in range(4000))
    assert set(homes) == set(IDLE)
    assert max(homes.values()) < 1.15 * min(homes.values())


def test_only_the_sessions_of_an_instance_that_is_gone_move() -> None:
    rest = {name: 0 for name in IDLE if name != "b"}
    for number in range(200):
        home = choose_instance(f"s{number}", IDLE)
        moved = choose_instance(f"s{number}", rest, last=home)
        assert moved == home if home != "b" else moved in rest


def test_an_overloaded_instance_gets_no_session_until_it_is_no_longer() -> None:
    for number in range(50):
        home = choose_instance(f"s{number}", IDLE)
        other = choose_instance(f"s{number}", IDLE | {home: 10})
        assert other != home
        assert choose_instance(f"s{number}", IDLE, last=other) == other
        assert choose_instance(f"s{number}", dict.fromkeys(IDLE, 10), last=home) == home


def test_what_an_instance_said_long_ago_does_not_count() -> None:
    loads = Loads()
    loads.note("a", 7, now=1.0)
    assert loads.waiting(["a", "b"], now=1.0 + FRESH_S / 2) == {"a": 7, "b": 0}
    assert loads.waiting(["a", "b"], now=1.0 + 2 * FRESH_S) == {"a": 0, "b": 0}
