"""When the next step is scheduled, while one runs."""

from __future__ import annotations

import pytest
from timed import Run

from tailserve.engine.types import Batch


@pytest.mark.parametrize("sooner", [0.0, 0.08])
def test_the_next_step_waits_at_the_executor_when_one_ends(sooner: float, monkeypatch: pytest.MonkeyPatch) -> None:
    base, per_token = 0.05, 0.001
    run = Run(base=base, per_token=per_token)
    request = run.add("normal", 8, 60)
    run.run(lambda: len(run.times[request.id]) == 20)
    run.executor.cost = ((1 - sooner) * base, (1 - sooner) * per_token)
    begin, submit, in_time = run.now, run.executor.submit, []

    def note_and_submit(batch: Batch) -> None:
        in_time.append(bool(run.executor.waiting))
        submit(batch)

    monkeypatch.setattr(run.executor, "submit", note_and_submit)
    run.run(lambda: run.now > begin + 5 * base)
    assert in_time[1:] == [True] * (len(in_time) - 1)
    assert len(in_time) > 3


def test_who_comes_in_the_first_half_of_a_step_is_in_the_next() -> None:
    run = Run(base=0.05)
    first = run.add("normal", 8, 60)
    run.run(lambda: len(run.times[first.id]) == 20)
    run.engine.step()
    second = run.add("normal", 8, 4)
    begin = run.now
    run.run(lambda: bool(run.times[second.id]))
    assert run.now - begin < 2 * 0.07
