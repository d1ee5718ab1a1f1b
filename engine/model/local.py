"""An executor in the engine's own process: for jobs that own the machine, and for tests."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.runner import ModelRunner
from tailserve.engine.types import Batch, StepResult


class LocalExecutor:
    """`tailserve.engine.engine.Executor` that runs each batch as it is submitted."""

    lost = False

    def __init__(self, model: PagedModel, **options: Any) -> None:
        """`options`: of `ModelRunner`."""
        self._make = partial(ModelRunner, model, **options)
        self.restart()

    def submit(self, batch: Batch) -> None:
        self._results.append(self._runner.run(batch))

    def poll(self, timeout_s: float | None = None) -> StepResult:
        return self._results.popleft()

    def restart(self) -> None:
        self._results: deque[StepResult] = deque()
        self._runner = self._make()
