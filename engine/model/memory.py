"""How many KV blocks fit: from the memory that is free when the weights are there."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from tailserve.engine.options import LoadOptions

CPU_SHARE = 0.25
"""Of the free memory, for KV on a CPU. A draft takes as much of what is left; the rest is for the other processes."""


def num_kv_blocks(options: LoadOptions, device: torch.device, bytes_per_token: int, max_model_len: int) -> int:
    """As many as all sequences could need, or as fit; one sequence of full length always does."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * options.gpu_memory_utilization) - (total - free)
    else:
        budget = int(free_host_memory() * CPU_SHARE)
    longest = math.ceil(max_model_len / options.block_size)
    fitting = budget // (bytes_per_token * options.block_size)
    return min(max(fitting, longest), options.max_num_seqs * longest)


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
