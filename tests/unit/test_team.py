"""How threads share a step's work."""

import threading

import numpy as np
import pytest
from numba import njit

from tailserve.engine.model.memory import aligned
from tailserve.engine.model.team import (
    LINE,
    OWN_ROWS,
    later,
    meet,
    owner_of,
    place_of,
    share_of,
    take,
    take_next,
    tasks_of,
    team_of,
)

pytestmark = pytest.mark.cores

KERNELS, TASKS = 400, 111


@njit(nogil=True)
def run(team, done, last, wrong):  # type: ignore[no-untyped-def]
    """Kernel after kernel; each task looks whether all of the kernel before are done."""
    member = team[0]
    for kernel in range(KERNELS):
        task = take(team, TASKS)
        while task < TASKS:
            if kernel > 0 and done[kernel - 1].sum() != TASKS:
                wrong[0] += 1
            done[kernel, task] += 1
            last[kernel, member] = task
            task = take_next(team, TASKS, task)
        meet(team, TASKS)
        team = later(team, 1)


def _lines(threads: int) -> np.ndarray:
    return aligned((KERNELS * threads, LINE // 8), np.int64)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_task_is_done_once_and_before_the_next_kernels(threads: int) -> None:
    lines, done = _lines(threads), np.zeros((KERNELS, TASKS), np.int64)
    last, wrong = np.zeros((KERNELS, threads), np.int64), np.zeros(1, np.int64)
    members = [
        threading.Thread(target=run, args=((member, threads, False, lines.ctypes.data), done, last, wrong))
        for member in range(threads)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert (done == 1).all()
    assert wrong[0] == 0


def test_nobody_waits_for_a_thread_and_who_comes_late_catches_up() -> None:
    lines, done = _lines(3), np.zeros((KERNELS, TASKS), np.int64)
    last, wrong = np.full((KERNELS, 3), -1), np.zeros(1, np.int64)
    for member in (1, 0, 2):
        run((member, 3, False, lines.ctypes.data), done, last, wrong)
    assert (done == 1).all()
    assert (last[:, [0, 2]] == -1).all()
    # Its own share came first, that of the thread before it last.
    assert (last[:, 1] == TASKS // 3 - 1).all()


def test_threads_keep_to_their_own_rows_where_there_are_many() -> None:
    assert team_of(1, 2, 2 * OWN_ROWS, 7) == (1, 2, True, 7)
    assert team_of(1, 2, 2 * OWN_ROWS - 1, 7) == (1, 2, False, 7)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("panels", [1, 4, 5, 48])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_products_tasks_are_all_panels_of_all_rows_once(threads: int, panels: int, by_rows: bool) -> None:
    team, tokens = (0, threads, by_rows, 0), 50
    tasks, seen = tasks_of(panels, team), np.zeros((panels, tokens), int)
    for task in range(tasks):
        panel, first, end = place_of(task, panels, tokens, team)
        seen[panel, first:end] += 1
        if by_rows:
            assert (first, end) == share_of(owner_of(task, tasks, threads), tokens, threads)
    assert (seen == 1).all()


@pytest.mark.parametrize("total", [1, 2, 31, 48, 49, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_shares_are_all_tasks_once(total: int, threads: int) -> None:
    owners = [owner_of(task, total, threads) for task in range(total)]
    shares = [share_of(share, total, threads) for share in range(threads)]
    assert owners == [share for share, (first, end) in enumerate(shares) for _ in range(first, end)]
    assert max(end - first for first, end in shares) - min(end - first for first, end in shares) <= 1
