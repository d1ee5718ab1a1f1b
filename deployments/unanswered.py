"""Which instances owe an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENT_S = 1.0
"""How long an instance may owe an answer, which takes milliseconds, before others are asked: it may be stopped, or hang."""


class Unanswered:
    """What was asked, of whom, since when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[object, tuple[str, float]] = {}

    @contextmanager
    def asking(self, instance: str | None) -> Iterator[None]:
        """Around what waits for its answer; None: of no instance in particular."""
        key = object()
        if instance is not None:
            self._asked[key] = instance, self._clock()
        try:
            yield
        finally:
            self._asked.pop(key, None)

    def silent(self) -> frozenset[str]:
        """Those that have owed one for `SILENT_S`."""
        now = self._clock()
        return frozenset(instance for instance, since in self._asked.values() if now > since + SILENT_S)
