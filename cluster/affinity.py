"""Which instance a session's requests go to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from hashlib import blake2b

BOUND = 1.25
"""How many times the mean number of waiting requests an instance may have and still get sessions, and `FEW` beyond that."""
FEW = 3
"""Waiting requests that are soon begun: to read a session's tokens again would take longer."""
FRESH_S = 0.5
"""How old what an instance said of its load may be."""


class Loads:
    """How many requests wait at each instance, as their own messages say."""

    def __init__(self) -> None:
        self._noted: dict[str, tuple[int, float]] = {}

    def note(self, instance: str, num_waiting: int, now: float) -> None:
        self._noted[instance] = num_waiting, now

    def waiting(self, instances: Collection[str], now: float) -> dict[str, int]:
        """Of those that said something lately; others count as idle."""
        # Serve may read it in another thread than that of the streams.
        noted = {name: self._noted.get(name, (0, now)) for name in instances}
        return {name: count if now < then + FRESH_S else 0 for name, (count, then) in noted.items()}


LOADS = Loads()
"""Of this process: its streams note them, its request router reads them."""


def choose_instance(session: str, waiting: Mapping[str, int], last: str | None = None) -> str:
    """The instance for a session's next request, by how many requests wait at each.

    It is the one of the session's last request if that is not overloaded. Else the first that is not, in an order of the
    session's own: rendezvous hashing (Thaler and Ravishankar 1998) with bounded loads (Mirrokni et al. 2018), so that all
    ingresses choose alike, and only the sessions of an instance that is gone move.
    """
    limit = math.ceil(BOUND * (sum(waiting.values()) + 1) / len(waiting)) + FEW
    order = sorted(waiting, key=lambda name: blake2b(f"{session}\0{name}".encode(), digest_size=8).digest())
    if last is not None and last in waiting:
        order.insert(0, last)
    return next(name for name in order if waiting[name] < limit)
