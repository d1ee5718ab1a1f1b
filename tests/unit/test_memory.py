"""KV blocks from free memory."""

import mmap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tailserve.engine.model import memory
from tailserve.engine.options import LoadOptions


def test_a_container_may_have_less_than_its_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n")
    assert memory.free_host_memory(tmp_path, tmp_path) == 4000 << 10
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_host_memory(tmp_path, tmp_path) == 4000 << 10
    (tmp_path / "memory.max").write_text("3000\n")
    assert memory.free_host_memory(tmp_path, tmp_path) == 2000
    (tmp_path / "memory.max").write_text("500\n")
    assert memory.free_host_memory(tmp_path, tmp_path) == 0


@pytest.mark.parametrize(("free", "blocks"), [(1 << 40, 64), (16 * 100 * 20 * 4, 20), (0, 8)])
def test_blocks_for_all_sequences_or_what_fits_or_one_sequence(
    free: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_host_memory", lambda: free)
    options = LoadOptions(path="", max_num_seqs=8, block_size=16)
    assert memory.num_kv_blocks(options, torch.device("cpu"), bytes_per_token=100, max_model_len=128) == blocks


def test_memory_is_taken_behind_the_back_of_who_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_AT_ONCE", 1 << 20)
    array = memory.untouched_zeros((2, 3000, 4096), np.uint8)
    array[1, 2000:2010] = 7
    before = _resident()
    memory.Reserve([array]).thread.join(60)
    assert _resident() - before > 0.9 * array.nbytes
    assert array.sum() == 7 * 10 * 4096


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_is_left_alone_while_steps_run_elsewhere_and_taken_where_they_will(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(memory.Reserve, "_take", lambda self, begin, end: taken.append(begin) or True)
    monkeypatch.setattr(memory, "_IDLE_S", 3600.0)
    monkeypatch.setattr(memory.time, "sleep", lambda _: busy.wait(60))
    busy = threading.Event()
    reserve = memory.Reserve.__new__(memory.Reserve)
    reserve._num_blocks, reserve._highest, reserve._used_at, reserve._begin = 3000, 0, -1e9, 256
    reserve.note_use(np.array([3, 700]))
    thread = threading.Thread(target=reserve._run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while len(taken) < 4 and time.monotonic() < deadline:
        time.monotonic()
    assert taken == [256, 512, 768, 1024]
    reserve._used_at = -1e9
    busy.set()
    thread.join(10)
    assert taken[-1] == 2816
