"""A model process as its router sees it: a Ray actor that can be started, watched, and started again."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tailserve.deployments.channel import Channel, Inlet, serve_channel
from tailserve.deployments.collector import keep_collector_out_of_steps
from tailserve.deployments.sockets import Sockets
from tailserve.engine.errors import ExecutorLostError

Options = TypeVar("Options")
Info = TypeVar("Info")
Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing")

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
OPENMP_SPINS = "20000"
"""Rounds, about half a millisecond, that OpenMP's threads spin behind their work: from one operation to the next, or one
step. Left to itself GNU's spins for up to ten milliseconds, on cores that the draft, the router and the ingress wait for."""


class ModelActor(Generic[Options, Info]):
    """The process side: one thread of it loads the model and runs it.

    OpenMP keeps a team of threads for each thread that ever used it, and stops spinning when there are more than cores: a
    second thread makes a CPU step twice as long.
    """

    incoming: type[Any]
    """What `serve` receives."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.inlet: Inlet[Any] | None = None
        """A second connection to listen to; `prepare` opens it."""

    def prepare(self, options: Options) -> tuple[Info, Callable[[Any], Any]]:
        """Loads what `options` say; what the router is told of it, and the function that answers messages."""
        raise NotImplementedError

    def load(self, options: Options) -> Info:
        # OpenMP reads it as it is loaded: with torch, which no process has at this point.
        os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
        info, self._answer = self._thread.submit(self.prepare, options).result()
        keep_collector_out_of_steps()
        return info

    def address(self) -> str:
        """A free port of this process' node, as host:port."""
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def serve(self, endpoint: str, key: bytes) -> None:
        """Answers messages for good: Ray ends the actor with its router. Without a raylet it ends by itself."""
        raylet = os.getppid()
        self._thread.submit(
            serve_channel,
            endpoint,
            self.incoming,
            self._answer,
            alive=lambda: os.getppid() == raylet,
            inlet=self.inlet,
            key=key,
        ).result()

    def pid(self) -> int:
        return os.getpid()


class ModelProcess(Generic[Outgoing, Incoming]):
    """Owns one actor at a time, and the channel to it.

    The actor's death shows at once, because the pending `serve` call fails.
    """

    def __init__(
        self,
        name: str,
        actor_class: type[ModelActor[Any, Any]],
        *,
        load_options: Any,
        incoming: type[Incoming],
        sockets: Sockets,
        bundle_index: int,
        actor_options: dict[str, Any],
        load_timeout_s: float,
    ) -> None:
        self.name = name
        self.channel: Channel[Outgoing, Incoming] | None = None
        self._actor_class = actor_class
        self.load_options = load_options
        """What the next actor is loaded with."""
        self._incoming = incoming
        self._sockets = sockets
        self._bundle_index = bundle_index
        self._actor_options = actor_options
        self._load_timeout_s = load_timeout_s
        self._actor: Any = None
        self._ended = threading.Event()
        self._incarnations = itertools.count()

    @property
    def ended(self) -> bool:
        """True once the actor has died, or before there was one."""
        return self._actor is None or self._ended.is_set()

    def start(self) -> Any:
        """Starts an actor, unless there is a new one; waits until it has loaded, and opens a channel. Returns what `load`
        returned.

        Whatever `load` raises is raised here: a model that cannot be served stays so. ExecutorLostError when it takes too
        long, or nowhere has the resources for it.
        """
        begin = time.monotonic()
        actor = self._actor or self.create()
        try:
            info = ray.get(actor.load.remote(self.load_options), timeout=self._load_timeout_s)
        except ray.exceptions.GetTimeoutError:
            self.kill()
            raise ExecutorLostError(f"the {self.name} was not loaded within {self._load_timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            self.kill()
            raise error.as_instanceof_cause() from error  # type: ignore[no-untyped-call]
        endpoint = self._sockets.endpoint(f"{self.name}-{next(self._incarnations)}")
        self.channel = Channel(endpoint, self._incoming, bind=True, key=self._sockets.secret_key)
        serving = actor.serve.remote(self.channel.endpoint, self._sockets.public_key)
        serving.future().add_done_callback(partial(_note_end, self.name, self._ended))
        if not self.channel.wait_connected(CONNECT_TIMEOUT_S):
            self.kill()
            raise ExecutorLostError(f"the {self.name} process did not open its channel within {CONNECT_TIMEOUT_S:g} s")
        logger.info("the %s is up after %.1f s", self.name, time.monotonic() - begin)
        return info

    def create(self) -> Any:
        """The actor, with nothing loaded."""
        options = dict(self._actor_options)
        group = get_current_placement_group()
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=self._bundle_index
            )
        # serve() keeps one thread for good; the other is for control calls.
        actor = ray.remote(self._actor_class).options(max_concurrency=2, max_restarts=0, **options).remote()
        self._actor = actor
        self._ended = threading.Event()
        return actor

    def pid(self) -> int:
        """The actor's process id, for tests and operators."""
        pid: int = ray.get(self._actor.pid.remote(), timeout=10)
        return pid

    def kill(self) -> None:
        """Ends the actor, whatever it is doing, and closes the channel."""
        if self._actor is not None:
            self._ended.set()
            ray.kill(self._actor)
            self._actor = None
        if self.channel is not None:
            self.channel.close()
            self.channel = None


def _note_end(name: str, ended: threading.Event, future: Future[None]) -> None:
    error = future.exception()
    if error is not None and not ended.is_set():
        logger.warning("the %s process ended: %s", name, error)
    ended.set()
