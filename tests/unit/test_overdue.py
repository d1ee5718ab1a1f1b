"""Those that cannot be in time any more, and those that have waited for too long. A step takes 10 ms and 1 ms a token."""

from __future__ import annotations

from timed import CRITICAL, NORMAL, Run, add_all, generating

from tailserve.engine.types import SloClass


def test_what_cannot_be_in_time_goes_behind_what_can() -> None:
    short = SloClass(name="normal", priority=10, ttft_s=1.0, tpot_s=0.2, speculation="off")
    run = Run(classes=(CRITICAL, short), max_num_seqs=2)
    first = add_all(run, "normal", 6, 100, 60)
    run.run(lambda: run.now > 1.5)
    fresh = run.add("normal", 100, 10)
    run.run(generating(run, [fresh]))
    waiting = [request for request in first if not run.times[request.id]]
    assert waiting, "the test wants a queue"
    assert run.ttft(fresh) <= 1.5
    run.run()
    assert all(len(run.times[request.id]) == 60 for request in first)


def test_those_that_are_late_have_a_turn_now_and_then() -> None:
    """Sixteen users and places for two of them: most first tokens are in time, and the others come, too."""
    short = SloClass(name="normal", priority=10, ttft_s=1.0, tpot_s=0.2, speculation="off")
    run = Run(classes=(CRITICAL, short), max_num_seqs=2)

    def keep_busy() -> bool:
        while sum(len(times) < 20 for times in run.times.values()) < 16:
            run.add("normal", 100, 20)
        return run.now > 60

    keep_busy()
    run.run(keep_busy)
    waits = sorted((times[0] if times else run.now) - run.arrivals[name] for name, times in run.times.items())
    assert waits[len(waits) // 2] <= 1.0
    assert waits[-1] < 20.0


def test_nobody_waits_for_ever() -> None:
    """Critical requests for everything there is, and a normal one that has an age to be served at."""
    run = Run(max_wait_s=3.0, max_num_seqs=4)
    normal = run.add("normal", 100, 20)

    def keep_busy() -> bool:
        while sum(not run.times[name] or len(run.times[name]) < 30 for name in run.times if name != normal.id) < 60:
            run.add("critical", 50, 30)
        return len(run.times[normal.id]) == 20 or run.now > 60

    run.run(keep_busy)
    assert run.times[normal.id], "starved"
    assert run.ttft(normal) < 5
    assert max(run.gaps(normal)) < 1


def test_whoever_waits_behind_starving_ones_of_its_own_class_is_served_all_the_same() -> None:
    run = Run(max_wait_s=2.0, max_num_seqs=64)
    normal = add_all(run, "normal", 8, 50, 5)

    def keep_busy() -> bool:
        while sum(len(run.times[name]) < 30 for name in run.times if name not in {r.id for r in normal}) < 40:
            run.add("critical", 50, 30)
        return all(len(run.times[request.id]) == 5 for request in normal) or run.now > 100

    run.run(keep_busy)
    assert all(len(run.times[request.id]) == 5 for request in normal), "starved"


def test_who_is_late_by_the_load_of_another_tenant_keeps_its_turn() -> None:
    short = SloClass(name="normal", priority=10, ttft_s=1.0, tpot_s=0.2, speculation="off")
    run = Run(classes=(CRITICAL, short), max_num_seqs=2)
    add_all(run, "normal", 20, 100, 40, tenant="loud")
    quiet = run.add("normal", 100, 10, tenant="quiet", age_s=2.0)

    def keep_fresh() -> bool:
        run.add("normal", 100, 40, tenant="loud")
        return bool(run.times[quiet.id]) or run.now > 5

    run.run(keep_fresh)
    assert run.times[quiet.id], "others that can be in time went before it"


def test_a_burst_of_the_most_urgent_class_does_not_pay_for_one_that_had_waited_for_too_long() -> None:
    """Five critical ones, for whom a step takes as long as they can bear, and a normal one that is served all the same."""
    tight = SloClass(name="critical", priority=0, ttft_s=0.5, tpot_s=0.0155, speculation="off")
    run = Run(classes=(tight, NORMAL), max_wait_s=1.0)
    critical, normal = add_all(run, "critical", 5, 10, 400), run.add("normal", 20, 400)
    run.run(lambda: run.now > 5)
    assert run.times[normal.id], "starved"
    assert all(run.tpot(request) < 0.0155 for request in critical)


def test_where_not_even_a_token_fits_who_had_waited_for_too_long_gets_one() -> None:
    slow = {"base": 0.010, "per_token": 0.020}
    tight = SloClass(name="critical", priority=0, ttft_s=0.5, tpot_s=0.05, speculation="off")
    run = Run(classes=(tight, NORMAL), max_wait_s=1.0, **slow)
    add_all(run, "critical", 2, 2, 200)
    normal = run.add("normal", 10, 5)
    run.run(lambda: bool(run.times[normal.id]) or run.now > 20)
    assert run.times[normal.id], "starved"
