"""Which CPUs the threads of a team stay on."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from test_decoder import FITTING
from tiny import save_model

from tailserve.engine.model.cpus import cpu_sets, stay_on
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")


@njit
def stay(cpus):  # type: ignore[no-untyped-def]
    stay_on(cpus.ctypes.data)


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    allowed = {3, 9}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    return allowed


def _cpus(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist()


def test_each_thread_has_one_of_the_process_cpus(two_cpus: set[int]) -> None:
    assert [_cpus(row) for row in cpu_sets(2)] == [[3], [9], [3, 9]]


def test_threads_may_be_moved_where_there_are_cpus_to_spare_or_too_few(two_cpus: set[int]) -> None:
    assert len(cpu_sets(1)) == 0
    assert len(cpu_sets(3)) == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_a_set_is_what_linux_takes() -> None:
    before = os.sched_getaffinity(0)
    sets = cpu_sets(len(before))
    try:
        stay(sets[1])
        assert os.sched_getaffinity(0) == {sorted(before)[1]}
        stay(sets[len(before)])
        assert os.sched_getaffinity(0) == before
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_whoever_runs_a_step_is_free_again_behind_it(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    paged = load_model(LoadOptions(path=save_model(FITTING["llama"], tmp_path), dtype="float32", num_blocks=8))[0]
    paged.forward([Span([1, 2, 3], 0, [0], 1)])
    assert os.sched_getaffinity(0) == before
    others = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
    if len(before) == 2:
        assert {sorted(before)[1]} in others
