"""When the next step is scheduled, while one runs."""

from __future__ import annotations

import pytest
from timed import Run

from tailserve.engine.types import Batch


@pytest.mark.parametrize("sooner", [0.0, 0.08])
def test_the_next_step_is_scheduled_shortly_before_one_ends(sooner: float, monkeypatch: pytest.MonkeyPatch) -> None:
    base, per_token = 0.05, 0.001
    run = Run(base=base, per_token=per_token)
    request = run.add("normal", 8, 60)
    run.run(lambda: len(run.times[request.id]) == 20)
    run.executor.cost = ((1 - sooner) * base, (1 - sooner) * per_token)
    submitted: list[float] = []
    submit = run.executor.submit

    def note_and_submit(batch: Batch) -> None:
        submitted.append(run.now)
        submit(batch)

    monkeypatch.setattr(run.executor, "submit", note_and_submit)
    run.run(lambda: len(submitted) == 6)
    run.run(lambda: run.times[request.id][-1] > submitted[-1])
    # The first belongs to a step that began before the change.
    left = [min(ended for ended in run.times[request.id] if ended > at) - at for at in submitted[1:]]
    # Whoever comes in the meantime is in the step after: so not long before.
    assert max(left) < 0.2 * base, f"seconds before the end: {left}"
