"""The parts of an engine step on a GPU, for engine_step.py."""

from __future__ import annotations

import time
from typing import Any

KERNELS = {
    "attention": ("attend_tiles", "combine_parts"),
    "norms": ("add_norm",),
    "split heads": ("split_heads",),
    "gate": ("gate",),
    "products": ("nvjet", "gemm", "splitK", "cutlass", "gemv"),
    "others": ("",),
}
"""Parts of a step, and what is in the names of their kernels."""


def use_modules() -> None:
    """Models that are loaded from now on run their own modules."""
    from tailserve.engine.model import fused

    fused.can_fuse = lambda model: False


def bandwidth(rounds: int) -> float:
    """Bytes a second, read and written by a copy."""
    import torch

    memory = torch.ones(1 << 27, dtype=torch.int64, device="cuda")
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        memory.clone()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * memory.nbytes / min(times)


def kernels(model: Any, work: Any, rounds: int) -> dict[str, float]:
    """Seconds of a step's kernels by `KERNELS`."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            model.forward(work)
        torch.cuda.synchronize()
    parts = dict.fromkeys(KERNELS, 0.0)
    for event in profile.key_averages():
        part = next(part for part, names in KERNELS.items() if any(name in event.key for name in names))
        parts[part] += event.self_device_time_total / 1e6 / rounds
    return parts


def report(variant: str, shapes: dict[str, dict[str, float]]) -> None:
    """Prints what `kernels` returned for each shape."""
    print(f"\n{variant}: kernels of a step, ms")
    print(f"{'':14}" + "".join(f"{part:>14}" for part in KERNELS))
    for name, parts in shapes.items():
        print(f"{name:14}" + "".join(f"{parts[part] * 1e3:>14.3f}" for part in KERNELS))
