"""Steps between processes: typed messages over a pair of ZeroMQ sockets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import zmq

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing")


class Channel(Generic[Outgoing, Incoming]):
    """One end of a connection between two processes on one node. One thread uses it at a time.

    Messages are encoded with msgspec, which builds nothing but the declared types (a pickle would run code). The endpoint
    is a socket file; whoever binds it keeps it in a directory that only its user can enter.
    """

    def __init__(self, endpoint: str, incoming: type[Incoming], *, bind: bool) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        if bind:
            self._socket.bind(endpoint)
        else:
            self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def wait_connected(self, timeout_s: float) -> bool:
        """Whether the other side has come; a message to a pair socket without a peer is refused."""
        return bool(self._socket.poll(int(timeout_s * 1000), zmq.POLLOUT))

    def send(self, message: Outgoing) -> bool:
        """Hands a message to the transport. False if the other side is gone and its queue is full."""
        data = self._encoder.encode(message)
        try:
            self._socket.send(data, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> Incoming | None:
        """The next message, or None after `timeout_s` seconds. msgspec.DecodeError if it is not of the declared type."""
        if not self._socket.poll(math.ceil(timeout_s * 1000)):
            return None
        return self._decoder.decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close()


def serve_channel(
    endpoint: str, incoming: type[Incoming], handler: Callable[[Incoming], Outgoing], *, alive: Callable[[], bool]
) -> None:
    """Answers messages while `alive()`. What the handler raises is raised: the state behind it is in doubt."""
    channel: Channel[Outgoing, Incoming] = Channel(endpoint, incoming, bind=False)
    try:
        while alive():
            message = channel.receive(1.0)
            if message is not None:
                channel.send(handler(message))
    finally:
        channel.close()
