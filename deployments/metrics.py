"""Metrics that go two ways: onto the server's own page `/metrics`, and to Ray, whose nodes export them as ray_..."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import prometheus_client

logger = logging.getLogger(__name__)

PREFIX = "tailserve_"
FRESH_S = 1.0
"""How old a page may be: to make one takes a moment in all processes."""
GROWTH = 1.2
"""From one bucket's bound to the next, which is how wrong a quantile can be; where samples spread over several buckets it
is a few percent."""

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


def buckets(least: float, most: float) -> list[float]:
    """Bounds of a histogram's buckets, each `GROWTH` times the one before."""
    count = math.ceil(math.log(most / least, GROWTH))
    return [float(f"{least * GROWTH**power:.4g}") for power in range(count + 1)]


class Metric:
    """One metric. `labels` are given with each value, and have few of them: never a user's text."""

    def __init__(self, ours: Any, rays: Any, labels: Mapping[str, str]) -> None:
        """`labels`: those that go with all values."""
        self._ours, self._rays, self._labels = ours, rays, labels
        # Ray adds a replica's own labels, and has no use for the page's `instance`.
        self._for_ray = {key: value for key, value in labels.items() if key != "instance"}

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Of a counter."""
        self._ours.labels(**self._labels, **labels).inc(amount)
        # Ray takes no 0.
        if amount > 0 and self._rays is not None:
            self._rays.inc(amount, self._for_ray | labels)

    def set(self, value: float, **labels: str) -> None:
        """Of a gauge."""
        self._ours.labels(**self._labels, **labels).set(value)
        if self._rays is not None:
            self._rays.set(value, self._for_ray | labels)

    def observer(self, **labels: str) -> Callable[[float], None]:
        """Observes on the page alone: for what happens at every token."""
        observe: Callable[[float], None] = self._ours.labels(**self._labels, **labels).observe
        return observe

    def observe(self, value: float, **labels: str) -> None:
        """Of a histogram."""
        self._ours.labels(**self._labels, **labels).observe(value)
        if self._rays is not None:
            self._rays.observe(value, self._for_ray | labels)


class Page:
    """The metrics of this process."""

    def __init__(self, rays: ModuleType | None = None, **labels: str) -> None:
        """`rays`: ray.serve.metrics, where Ray is to have them, too. `labels` go with all of them; `instance` names the
        process."""
        self._registry = prometheus_client.CollectorRegistry()
        self._rays, self._labels = rays, labels

    def counter(self, name: str, text: str, *labels: str) -> Metric:
        return self._make("Counter", name, text, labels)

    def gauge(self, name: str, text: str, *labels: str) -> Metric:
        return self._make("Gauge", name, text, labels)

    def histogram(self, name: str, text: str, bounds: list[float], *labels: str) -> Metric:
        return self._make("Histogram", name, text, labels, bounds)

    def text(self) -> str:
        """In Prometheus' format."""
        return prometheus_client.generate_latest(self._registry).decode()

    def _make(self, kind: str, name: str, text: str, labels: Sequence[str], bounds: list[float] | None = None) -> Metric:
        name = PREFIX + name
        more = {} if bounds is None else {"buckets": bounds}
        ours = getattr(prometheus_client, kind)(name, text, [*self._labels, *labels], registry=self._registry, **more)
        rays = None
        if self._rays is not None:
            keys = tuple(key for key in (*self._labels, *labels) if key != "instance")
            rays = getattr(self._rays, kind)(name, text, *([] if bounds is None else [bounds]), keys)
        return Metric(ours, rays, self._labels)


def merge(pages: Iterable[str]) -> str:
    """Pages of several processes as one: each metric's values together, as the format asks for."""
    families: dict[str, list[str]] = {}
    for page in pages:
        for block in page.split("# HELP ")[1:]:
            head, kind, *values = block.splitlines()
            families.setdefault(head.split(" ", 1)[0], [f"# HELP {head}", kind]).extend(values)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


class Gatherer:
    """The metrics of all processes, asked for once however many want them."""

    def __init__(self, sources: Mapping[str, Callable[[], Awaitable[list[str]]]]) -> None:
        """`sources`: name to the pages of some processes; of one that fails, or is late, the last are shown."""
        self._sources = sources
        self._last: dict[str, list[str]] = {}
        self._task: asyncio.Task[str] | None = None
        self._made_at = -math.inf

    async def text(self) -> str:
        """In Prometheus' format."""
        if self._task is None or (self._task.done() and time.monotonic() - self._made_at > FRESH_S):
            self._task = asyncio.create_task(self._gather(), name="metrics")
        # Whoever leaves does not take it from the others.
        return await asyncio.shield(self._task)

    async def _gather(self) -> str:
        answers = await asyncio.gather(*(source() for source in self._sources.values()), return_exceptions=True)
        for name, answer in zip(self._sources, answers, strict=True):
            if isinstance(answer, BaseException):
                logger.warning("no new metrics of %s: %s", name, answer or type(answer).__name__)
            else:
                self._last[name] = answer
        self._made_at = time.monotonic()
        return merge(page for pages in self._last.values() for page in pages)
