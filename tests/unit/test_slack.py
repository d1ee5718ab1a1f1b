"""Scheduling by slack, on an engine whose steps take 10 ms and 1 ms a token."""

from __future__ import annotations

import pytest
from fakes import make_request
from timed import BASE, CRITICAL, NORMAL, PER_TOKEN, Run, add_all, generating

from tailserve.engine.cost import SIZES, StepTimes
from tailserve.engine.pace import LEAST_AIM, MOST_AIM, Pace
from tailserve.engine.sequence import Key, Sequence
from tailserve.engine.slo import AIM, hurry
from tailserve.engine.types import SloClass


@pytest.mark.parametrize("policy", ["slack", "priority"])
def test_a_critical_request_keeps_its_pace_beside_many_others(policy: str) -> None:
    run = Run(scheduling_policy=policy)
    normal = add_all(run, "normal", 60, 4, 120)
    run.run(generating(run, normal))
    critical = run.add("critical", 60, 40)
    run.run(lambda: len(run.times[critical.id]) == 40)
    kept = run.ttft(critical) <= 0.5 and run.tpot(critical) <= 0.04
    assert kept == (policy == "slack"), f"first after {run.ttft(critical):.3f} s, {run.tpot(critical):.4f} s a token"
    if policy == "slack":
        assert all(max(run.gaps(request)) < 0.5 for request in normal), "somebody was left out for long"
    run.run()
    assert all(len(run.times[request.id]) == 120 for request in normal)


def test_a_critical_request_gets_its_first_token_in_time_while_long_prompts_are_read() -> None:
    run = Run()
    add_all(run, "normal", 8, 900, 4)
    run.run(lambda: run.now > 0.3)
    critical = run.add("critical", 100, 10)
    run.run()
    # 100 ms at most until the step that runs has ended, 110 for its own prompt.
    assert run.ttft(critical) < 0.3


def test_prompts_of_guarded_classes_are_read_though_others_generate_at_the_limit_of_their_pace() -> None:
    run = Run()
    first = add_all(run, "critical", 25, 4, 100)
    run.run(generating(run, first))
    second = run.add("critical", 100, 10)
    run.run(generating(run, [second]))
    assert run.ttft(second) < 0.5


def test_a_sequence_is_no_further_ahead_of_its_pace_than_a_few_tokens() -> None:
    run = Run()
    critical = run.add("critical", 4, 200)
    run.run(lambda: len(run.times[critical.id]) == 100)
    add_all(run, "normal", 60, 40, 20)
    run.run()
    # A second of tokens made early buys a few long steps, no more.
    assert sum(gap > 0.045 for gap in run.gaps(critical)) <= 3


def test_no_step_is_so_long_that_somebody_who_arrives_could_not_be_in_time() -> None:
    run = Run()
    add_all(run, "normal", 4, 900, 2)
    run.run()
    assert max(sum(batch.lengths) for batch in run.executor.batches) * PER_TOKEN + BASE <= 0.1 + 1e-9


def test_no_more_run_than_keep_their_pace() -> None:
    tight = SloClass(name="normal", priority=10, ttft_s=50.0, tpot_s=0.05, speculation="off")
    run = Run(classes=(CRITICAL, tight))
    requests = add_all(run, "normal", 60, 4, 400)
    counts = []

    def note() -> bool:
        counts.append(run.engine.gauges().num_running)
        return False

    run.run(note)
    # A step of 40 takes 50 ms.
    assert 35 <= max(counts) <= 40
    assert all(run.tpot(request) <= 0.055 for request in requests)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_cap_follows_the_p99_unless_steps_are_kept_short_for_the_class(guarded: bool) -> None:
    # By step times alone 64 may run.
    pace = Pace(NORMAL, StepTimes([(size, 0.2 * size / 64) for size in SIZES[:7]]), 64, guarded=guarded)
    keys = [Key(10, late=False, tag=0.0, number=number) for number in range(4)]
    running = [Sequence(make_request([1]), NORMAL, 0.0, key, 64) for key in keys]

    def review(pace_s: float, count: int) -> int:
        for seq in running:
            seq.pace_s = pace_s
        for _ in range(count):
            pace.review(running)
        return pace.cap

    assert (review(0.97 * NORMAL.tpot_s, 10) < 50) != guarded
    assert review(0.5 * NORMAL.tpot_s, 40) >= 60


def test_prompts_in_a_hurry_leave_the_others_their_share_however_many_they_are() -> None:
    run = Run()
    first = add_all(run, "critical", 20, 4, 100)
    run.run(generating(run, first))
    add_all(run, "critical", 5, 60, 10)
    run.run()
    assert max(gap for request in first for gap in run.gaps(request)) <= (BASE + 25 * PER_TOKEN) / (1 - 0.75)


def test_who_may_not_start_takes_no_slot() -> None:
    """Critical requests beyond what their pace allows, and all slots taken."""
    run = Run(max_num_seqs=40)
    normal = add_all(run, "normal", 30, 4, 60)
    run.run(generating(run, normal))
    add_all(run, "critical", 60, 4, 30)
    run.run()
    # 30 critical ones fit into 40 ms; 20 of them take slots of others, and a few when others end.
    assert run.engine.stats.preemptions <= 40


def test_first_come_first_served() -> None:
    run = Run(scheduling_policy="fcfs", max_num_seqs=1)
    requests = [run.add(name, tokens, 2) for name, tokens in [("normal", 400), ("critical", 4)] * 4]
    run.run()
    firsts = [run.times[request.id][0] for request in requests]
    assert firsts == sorted(firsts)
    assert max(length for batch in run.executor.batches for length in batch.lengths) == 400


def test_a_busy_machine_lowers_the_cap_within_two_seconds_and_an_idle_one_raises_it_again() -> None:
    tight = SloClass(name="normal", priority=10, ttft_s=500.0, tpot_s=0.05, speculation="off")
    run = Run(classes=(CRITICAL, tight))
    caps: dict[float, list[int]] = {}

    def until(moment: float) -> int:
        """Always 64 that want to run. The cap, in the middle of the last second."""
        seen = caps[moment] = []

        def keep_busy() -> bool:
            while len(run.engine.scheduler._sequences) < 64:
                run.add("normal", 4, 20)
            if run.now > moment - 1:
                seen.append(run.engine.paces()["normal"].cap)
            return run.now > moment

        keep_busy()
        run.run(keep_busy)
        return sorted(seen)[len(seen) // 2]

    before = until(6.0)
    run.executor.cost = (2 * BASE, 2 * PER_TOKEN)
    busy = until(8.0)
    run.executor.cost = (BASE, PER_TOKEN)
    after = until(16.0)
    assert 20 < before <= 40
    assert busy < 0.7 * before
    assert after > 0.8 * before


def test_a_third_class_takes_nothing_from_the_first() -> None:
    bulk = SloClass(name="bulk", priority=20, ttft_s=60.0, tpot_s=1.0, speculation="off")
    run = Run(classes=(CRITICAL, NORMAL, bulk))
    normal = add_all(run, "normal", 60, 4, 120)
    run.run(generating(run, normal))
    critical = run.add("critical", 60, 40)
    run.run(lambda: len(run.times[critical.id]) == 40)
    assert run.ttft(critical) <= 0.5
    assert run.tpot(critical) <= 0.04
    run.run()


def test_what_a_stall_cost_is_not_made_good_at_everybodys_cost() -> None:
    """A verifier that was gone for five seconds."""
    run = Run()
    critical, normal = add_all(run, "critical", 8, 40, 300), add_all(run, "normal", 20, 40, 300)
    run.run(generating(run, [*critical, *normal]))
    run.executor.fail_next = 1
    run.engine.step()
    run.executor.clock.stall(5.0)
    begin = run.now
    run.run(lambda: run.now > begin + 10)
    assert all(run.times[request.id][-1] > begin for request in (*critical, *normal))
    # 1200 if all of it were made good.
    assert sum(moment > begin for request in normal for moment in run.times[request.id]) > 1700
    run.run()


def test_what_is_aimed_at_follows_how_near_answers_came() -> None:
    pace = Pace(CRITICAL, StepTimes(()), 64, guarded=True)
    seq = Sequence(make_request([1], max_tokens=100), CRITICAL, 0.0, Key(0, False, 0.0, 1), 1000)
    seq.token_ids += [1] * 11

    def end(tpot_s: float) -> float:
        seq.begun_s, seq.token_s = 1.0, 1.0 + 10 * tpot_s
        pace.note_end(seq)
        return pace.aimed_s

    before = pace.aimed_s
    near = end(0.039)
    assert near < before < 0.04
    assert near < end(0.036) < before
    assert [end(0.05) for _ in range(100)][-1] == pytest.approx(LEAST_AIM * 0.04)
    assert [end(0.01) for _ in range(10_000)][-1] == pytest.approx(MOST_AIM * 0.04)
    seq.num_preemptions = 1
    assert end(0.05) == pytest.approx(MOST_AIM * 0.04), "it was without a place for a while"


def test_nothing_is_in_a_hurry_before_step_times_are_known() -> None:
    seq = Sequence(make_request([1]), CRITICAL, 0.0, Key(0, False, 0.0, 1), 1000)
    assert hurry([seq], AIM * CRITICAL.ttft_s, StepTimes(())) == 0.0


def test_those_who_may_not_start_keep_nobody_else_out() -> None:
    """Two classes of one priority: of the first, steps of its pace hold ten, and more wait than there are places."""
    slow, quick = (SloClass(name=name, priority=10, ttft_s=5.0, tpot_s=tpot_s) for name, tpot_s in (("a", 0.02), ("b", 1.0)))
    run = Run(classes=(CRITICAL, slow, quick))
    first = add_all(run, "a", 100, 4, 200)
    run.run(lambda: run.now > 1.0)
    second = add_all(run, "b", 4, 4, 20)
    run.run(generating(run, second))
    assert max(map(run.ttft, second)) < 1.0
    assert sum(not run.times[request.id] for request in first) > 64, "there was no line"
