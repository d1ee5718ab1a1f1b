"""When Python's garbage collector may stop a process whose steps must not be late."""

from __future__ import annotations

import gc

YOUNG = 100_000
"""Container objects made before the youngest are looked at; what dies by reference count is never among them."""


def keep_collector_out_of_steps() -> None:
    """Spares everything that lives now, and makes collections rare.

    With the default thresholds a collection of all objects comes every hundred steps or so, and takes 15 ms with 1,024
    running sequences; a step takes 4. Reference counting frees nearly everything: cycles come from exceptions and tasks.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, 50, 100)
