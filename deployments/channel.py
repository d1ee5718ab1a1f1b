"""Steps between processes: typed messages over a pair of ZeroMQ sockets."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from tailserve.deployments.sockets import connect, listen

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing")


ONE_WAY_MESSAGES = 64
"""On their way at most; further ones are dropped."""


class Channel(Generic[Outgoing, Incoming]):
    """One end of a connection between two processes. One thread uses it at a time.

    Messages are encoded with msgspec, which builds nothing but the declared types (a pickle would run code).
    """

    def __init__(self, endpoint: str, incoming: type[Incoming], *, bind: bool, key: bytes = b"") -> None:
        """`key`: of `Sockets`, the secret one to bind, the public one to connect."""
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.endpoint = endpoint
        """Where the other end connects."""
        if bind:
            self.endpoint = listen(self.socket, endpoint, key)
        else:
            connect(self.socket, endpoint, key)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def wait_connected(self, timeout_s: float) -> bool:
        """Whether the other side has come; a message to a pair socket without a peer is refused."""
        return bool(self.socket.poll(int(timeout_s * 1000), zmq.POLLOUT))

    def send(self, message: Outgoing) -> bool:
        """Hands a message to the transport. False if the other side is gone and its queue is full."""
        data = self._encoder.encode(message)
        try:
            self.socket.send(data, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> Incoming | None:
        """The next message, or None after `timeout_s` seconds. msgspec.DecodeError if it is not of the declared type."""
        if not self.socket.poll(math.ceil(timeout_s * 1000)):
            return None
        return self._decoder.decode(self.socket.recv())

    def close(self) -> None:
        self.socket.close()


class Outlet(Generic[Outgoing]):
    """The sending end of a one-way connection. Whoever listens may come and go; without one, messages are dropped."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, ONE_WAY_MESSAGES)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: Outgoing) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK, copy=False)


class Inlet(Generic[Incoming]):
    """The receiving end: hands what comes to `handler`."""

    def __init__(self, endpoint: str, incoming: type[Incoming], handler: Callable[[Incoming], None]) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, ONE_WAY_MESSAGES)
        self.socket.bind(endpoint)
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._handler = handler

    def take(self, timeout_s: float = 0.0) -> Incoming | None:
        """Handles the next message; None if there is none in time."""
        if not self.socket.poll(math.ceil(timeout_s * 1000)):
            return None
        message = self._decoder.decode(self.socket.recv())
        self._handler(message)
        return message


def serve_channel(
    endpoint: str,
    incoming: type[Incoming],
    handler: Callable[[Incoming], Outgoing | None],
    *,
    alive: Callable[[], bool],
    inlet: Inlet[Any] | None = None,
    key: bytes = b"",
) -> None:
    """Answers messages while `alive()`, unless with None, and takes what comes by `inlet` as it comes.

    What a handler raises is raised: the state behind it is in doubt.
    """
    channel: Channel[Outgoing, Incoming] = Channel(endpoint, incoming, bind=False, key=key)
    poller = zmq.Poller()
    poller.register(channel.socket, zmq.POLLIN)
    if inlet is not None:
        poller.register(inlet.socket, zmq.POLLIN)
    try:
        while alive():
            ready = dict(poller.poll(1000))
            if inlet is not None and inlet.socket in ready:
                inlet.take()
            elif channel.socket in ready and (message := channel.receive(0.0)) is not None:
                answer = handler(message)
                if answer is not None:
                    channel.send(answer)
    finally:
        channel.close()
