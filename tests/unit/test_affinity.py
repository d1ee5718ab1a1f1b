"""Where sessions go."""

from collections import Counter

from tailserve.cluster.affinity import FRESH_S, Loads, Placing, choose_instance
from tailserve.engine.stats import InstanceLoad

IDLE = {"a": 0, "b": 0, "c": 0, "d": 0}
STRANGER = Placing("critical", 100)


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


def busy(critical_s: float, normal_s: float, num_waiting: int = 0) -> InstanceLoad:
    return InstanceLoad(num_waiting, {"critical": critical_s, "normal": normal_s}, 0.001)


def among(*instances: str) -> Loads:
    loads = Loads()
    loads.note_running(instances)
    return loads


def test_strangers_go_where_the_first_token_of_their_class_comes_soonest() -> None:
    loads = among("a", "b")
    loads.note("a", busy(0.0, 9.0), now=1.0)
    loads.note("b", busy(0.4, 1.0), now=1.0)
    assert loads.choose(STRANGER, now=1.1) == "a"
    assert loads.choose(STRANGER._replace(slo_class="normal"), now=1.1) == "b"


def test_a_silent_instance_reads_as_fast_as_the_others() -> None:
    loads = among("a", "b")
    loads.note("a", InstanceLoad(0, {"critical": 1.0}, 0.00001), now=1.0)
    assert loads.choose(STRANGER._replace(num_tokens=8000), now=1.0) == "b"


def test_those_that_nothing_tells_apart_get_as_much() -> None:
    # In any order at first, and then by what each was sent.
    firsts = set()
    for _ in range(50):
        loads = among("a", "b")
        loads.note("a", busy(0.0, 0.0), now=1.0)
        chosen = Counter(loads.choose(STRANGER, now=1.0) for _ in range(10))
        assert chosen == {"a": 5, "b": 5}
        firsts.add(among("a", "b").choose(STRANGER, now=1.0))
    assert firsts == {"a", "b"}


def test_what_was_just_sent_there_counts_until_the_instance_says_more() -> None:
    loads = among("a", "b")
    loads.note("a", busy(0.0, 0.0), now=1.0)
    loads.note("b", busy(0.05, 0.05), now=1.0)
    assert [loads.choose(STRANGER, now=1.0) for _ in range(3)] == ["a", "b", "a"]
    # The same again: it was said before what was sent there arrived.
    loads.note("a", busy(0.0, 0.0), now=1.1)
    assert loads.choose(STRANGER, now=1.1) == "b"
    loads.note("a", busy(0.01, 0.0), now=1.1)
    assert loads.choose(STRANGER, now=1.1) == "a"


def test_a_session_counts_those_who_wait() -> None:
    loads = among("a", "b")
    placing = Placing("critical", 1, session="s", last="a")
    loads.note("a", busy(0.0, 0.0, num_waiting=20), now=1.0)
    assert loads.choose(placing, now=1.0) == "b"
    assert loads.choose(placing, now=1.0 + 2 * FRESH_S) == "a"


def test_what_an_instance_said_long_ago_does_not_count() -> None:
    loads = among("a", "b")
    loads.note("a", busy(7.0, 7.0), now=1.0)
    assert loads.choose(STRANGER, now=1.0 + FRESH_S / 2) == "b"
    loads = among("a", "b")
    loads.note("a", busy(7.0, 7.0), now=1.0)
    assert {loads.choose(STRANGER, now=2.0 + FRESH_S * number) for number in range(1, 60)} == {"a", "b"}


def test_those_that_are_gone_are_neither_chosen_nor_remembered() -> None:
    loads = among("3", "99")
    for number in range(100):
        loads.note(str(number), busy(1.0, 1.0), now=float(number))
    assert loads.choose(STRANGER, now=100.0 + FRESH_S) in {"3", "99"}
    assert set(loads._noted) == {"3", "99"}
    loads.note_running(["99"])
    assert loads.choose(STRANGER, now=101.0) == "99"
    loads.note_running([])
    assert loads.choose(STRANGER, now=101.0) is None


def test_instances_that_a_request_lost_are_avoided_while_there_are_others() -> None:
    loads = among("a", "b")
    assert {loads.choose(STRANGER._replace(avoid=frozenset({"a"})), now=1.0) for _ in range(20)} == {"b"}
    assert {loads.choose(STRANGER._replace(avoid=frozenset({"a", "b"})), now=1.0) for _ in range(20)} == {"a", "b"}
