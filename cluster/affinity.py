"""Which instance a request goes to."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from tailserve.engine.stats import InstanceLoad

BOUND = 1.25
"""How many times the mean number of waiting requests an instance may have and still get sessions, and `FEW` beyond that."""
FEW = 3
"""Waiting requests that are soon begun: to read a session's tokens again would take longer."""
FRESH_S = 0.5
"""How old what an instance said of its load may be."""
ALIKE_S = 0.02
"""Differences in the time to a first token that mean nothing."""


class Placing(NamedTuple):
    """What decides where a request goes."""

    slo_class: str
    num_tokens: int
    """Of its prompt."""
    session: str | None = None
    last: str | None = None
    """Where the session's last request went."""
    avoid: frozenset[str] = frozenset()
    """Instances that were lost to the request, as far as there are others."""


class _Note(NamedTuple):
    load: InstanceLoad
    noted_s: float
    placed: int
    """Tokens of prompts that were sent there since its load changed."""


class Loads:
    """How busy each instance is: what its own messages say, and what was sent there since. One that is silent is idle."""

    def __init__(self) -> None:
        self._running: tuple[str, ...] = ()
        self._noted: dict[str, _Note] = {}
        # Serve tells in another thread than that of the streams.
        self._lock = threading.Lock()

    def note_running(self, instances: Iterable[str]) -> None:
        """The instances that take requests, as Serve knows them."""
        with self._lock:
            self._running = tuple(instances)

    def note(self, instance: str, load: InstanceLoad, now: float) -> None:
        with self._lock:
            before = self._noted.get(instance)
            placed = before.placed if before is not None and before.load == load else 0
            self._noted[instance] = _Note(load, now, placed)

    def choose(self, placing: Placing, now: float) -> str | None:
        """The instance for a request; None if none is known."""
        with self._lock:
            left = [name for name in self._running if name not in placing.avoid] or self._running
            return self._choose(placing, left, now) if left else None

    def _choose(self, placing: Placing, instances: Sequence[str], now: float) -> str:
        fresh = {name: note for name, note in self._noted.items() if now < note.noted_s + FRESH_S}
        # What the others said is forgotten once they are gone.
        self._noted = {name: self._noted[name] for name in instances if name in self._noted} | fresh
        # Instances are alike: what one takes for a token, a silent one does too.
        said = [note.load.token_s for note in self._noted.values()]
        idle = _Note(InstanceLoad(0, {}, max(said, default=0.0)), now, 0)
        notes = {name: fresh.get(name, idle) for name in instances}
        if placing.session is not None:
            waiting = {name: note.load.num_waiting for name, note in notes.items()}
            name = choose_instance(placing.session, waiting, placing.last)
        else:
            name = choose_quickest({name: _first_token_s(note, placing) for name, note in notes.items()})
        self._noted[name] = notes[name]._replace(placed=notes[name].placed + placing.num_tokens)
        return name


LOADS = Loads()
"""Of this process: its streams and its request router note them, its ingress chooses by them."""


def _first_token_s(note: _Note, placing: Placing) -> float:
    return note.load.waits_s.get(placing.slo_class, 0.0) + (note.placed + placing.num_tokens) * note.load.token_s


def choose_quickest(first_token_s: Mapping[str, float]) -> str:
    """One of the instances whose next first token comes soonest, or hardly later."""
    soonest = min(first_token_s.values())
    return random.choice([name for name, seconds in first_token_s.items() if seconds <= soonest + ALIKE_S])


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
