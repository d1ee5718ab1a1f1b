"""Memory for KV blocks: how many fit into what is free when the weights are there, and how it is taken on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailserve.engine.options import LoadOptions

CPU_SHARE = 0.25
"""Of the free memory, for KV on a CPU. A draft model takes as much again; the rest is for the other processes."""

_BLOCKS_AT_A_TIME = 256
_AT_ONCE = 1 << 30
"""Bytes that are there before the first step: blocks for tens of thousands of tokens, in a second or two."""
_IDLE_S = 0.2


def num_kv_blocks(options: LoadOptions, device: torch.device, bytes_per_token: int, max_model_len: int) -> int:
    """As many as all sequences could need, or as fit; one sequence of full length always does."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * options.gpu_memory_utilization) - (total - free)
    else:
        budget = int(free_host_memory() * CPU_SHARE) // options.tensor_parallel_size
    longest = math.ceil(max_model_len / options.block_size)
    fitting = budget // (bytes_per_token * options.block_size) - options.num_spare_blocks
    return min(max(fitting, longest), options.max_num_seqs * longest)


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros whose memory begins at a cache line; numpy asks for huge pages where they are large."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    array: npt.NDArray[Any] = memory[begin : begin + size].view(dtype).reshape(shape)
    array[...] = 0
    return array


def free_host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: what the machine has left, or its container (cgroup v2), if that is less."""
    free = 8 << 30
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass  # not Linux: the guess above
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((cgroup / "memory.current").read_text()))
    except OSError:
        pass  # no limit that can be seen
    return max(free, 0)


def untouched_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that begin at a page and take no memory until they are written to, in huge pages where there are."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # Private: what processes could share comes in small pages, and every block would miss the translation cache.
    memory = mmap.mmap(-1, size) if sys.platform == "win32" else mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class Reserve:
    """Takes the memory of arrays [layers, blocks, ...] that are in use already, first blocks first, a little at a time.

    A virtual machine may need milliseconds to come up with a page, which a step should not wait for, and seconds for all of
    them, which a start should not. So a thread of low priority does it while nothing else is to be done, or where the blocks
    that are next in line would otherwise be touched first by a step. Linux can since 5.14; elsewhere pages come with their
    first use.
    """

    def __init__(self, arrays: Sequence[npt.NDArray[Any]], num_spare: int = 0) -> None:
        """The last `num_spare` blocks are used out of turn, and are there from the beginning."""
        self._arrays = arrays
        self._num_blocks = arrays[0].shape[1] - num_spare
        self._highest = 0
        self._used_at = -math.inf
        self.thread = threading.Thread(target=self._run, name="reserve", daemon=True)
        if sys.platform == "linux":
            size = sum(array.nbytes for array in arrays)
            self._begin = min(math.ceil(_AT_ONCE / max(size, 1) * self._num_blocks), self._num_blocks)
            self._take(self._num_blocks, self._num_blocks + num_spare)
            if self._take(0, self._begin):
                self.thread.start()

    def note_use(self, blocks: npt.NDArray[Any]) -> None:
        """Called at each step with the blocks it uses."""
        highest = int(blocks.max())
        if highest >= self._num_blocks:
            highest = int(blocks[blocks < self._num_blocks].max(initial=0))
        self._highest = max(self._highest, highest)
        self._used_at = time.monotonic()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for begin in range(self._begin, self._num_blocks, _BLOCKS_AT_A_TIME):
            while begin > self._highest + 2 * _BLOCKS_AT_A_TIME and time.monotonic() - self._used_at < _IDLE_S:
                time.sleep(_IDLE_S)
            if not self._take(begin, begin + _BLOCKS_AT_A_TIME):
                return

    def _take(self, begin: int, end: int) -> bool:
        # Unlike the mmap module's, this call lets other threads run meanwhile.
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        populate_write = 23
        for array in self._arrays:
            for layer in array:
                part = layer[begin:end]
                first = part.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
                if madvise(first, part.ctypes.data + part.nbytes - first, populate_write):
                    return False
        return True
