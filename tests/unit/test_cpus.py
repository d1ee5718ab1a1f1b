"""Which CPUs the threads of a team stay on."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from test_decoder import FITTING
from tiny import save_model

from tailserve.engine.model.cpus import cpu_sets, note_cpus, stay_on
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")


@njit
def note(cpus):  # type: ignore[no-untyped-def]
    note_cpus(cpus.ctypes.data)


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
    assert [_cpus(row) for row in cpu_sets(2)] == [[3], [9], []]


def test_threads_may_be_moved_where_there_are_cpus_to_spare_or_too_few(two_cpus: set[int]) -> None:
    assert len(cpu_sets(1)) == 0
    assert len(cpu_sets(3)) == 0


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU")
def test_a_set_is_what_linux_takes_and_gives() -> None:
    before = os.sched_getaffinity(0)
    sets = cpu_sets(len(before))
    try:
        note(sets[len(before)])
        assert _cpus(sets[len(before)]) == sorted(before)
        stay(sets[1])
        assert os.sched_getaffinity(0) == {sorted(before)[1]}
        stay(sets[len(before)])
        assert os.sched_getaffinity(0) == before
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU")
def test_whoever_runs_a_step_may_run_where_it_could_before(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    paged = load_model(LoadOptions(path=save_model(FITTING["llama"], tmp_path), dtype="float32", num_blocks=8))[0]
    try:
        for allowed in (before, {max(before)}):
            os.sched_setaffinity(0, allowed)
            paged.forward([Span([1, 2, 3], 0, [0], 1)])
            assert os.sched_getaffinity(0) == allowed
    finally:
        os.sched_setaffinity(0, before)
