"""Tokens past Ray, from a router to an ingress on its node: through a socket file that the ingress binds.

A message on a stream of Ray's costs its two ends milliseconds of CPU time. Where there is no GPU, that is the model's.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import zmq

logger = logging.getLogger(__name__)


LINGER_MS = 1000
"""How long what was sent may still be on its way when an ingress is forgotten."""


class TokenInlet:
    """An ingress's end, on its event loop."""

    def __init__(self, handler: Callable[[str, bytes], None]) -> None:
        """`handler`: called with the name of an instance and what it sent."""
        self._handler = handler
        # mkdtemp makes it private to this user.
        self._directory = Path(tempfile.mkdtemp(prefix="tailserve-"))
        self.address = str(self._directory / "tokens")
        """What routers connect to."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(f"ipc://{self.address}")
        self._loop = asyncio.get_event_loop()
        self._loop.add_reader(self._socket.fileno(), self._take)

    def _take(self) -> None:
        # The descriptor tells of changes only: all that is there must be read.
        while True:
            try:
                instance, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._handler(instance.decode(), data)
            except Exception:
                logger.exception("a message of instance %s could not be read", instance.decode())

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class TokenOutlets:
    """A router's ends, by ingress. Any thread may use them."""

    def __init__(self, instance: str) -> None:
        self._instance = instance.encode()
        self._lock = threading.Lock()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        """By address."""
        self._addresses: dict[str, str] = {}
        """Ingress to where it listens; one that is not here has a stream only."""

    def connect(self, ingress: str, address: str) -> None:
        """From now on this ingress gets its messages at an address, if that is on this node. Before its first one."""
        with self._lock:
            if ingress in self._addresses or not (address in self._sockets or _answers(address)):
                return
            self._addresses[ingress] = address
            if address not in self._sockets:
                outlet: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
                self._sockets[address] = outlet
                outlet.setsockopt(zmq.LINGER, LINGER_MS)
                outlet.setsockopt(zmq.SNDHWM, 0)
                outlet.connect(f"ipc://{address}")

    def send(self, ingress: str, data: bytes) -> bool:
        """Whether it has a connection, and the message is on its way."""
        with self._lock:
            address = self._addresses.get(ingress)
            if address is None:
                return False
            self._sockets[address].send_multipart([self._instance, data], zmq.NOBLOCK)
            return True

    def keep(self, ingresses: set[str]) -> None:
        """Forgets all others."""
        with self._lock:
            self._addresses = {name: address for name, address in self._addresses.items() if name in ingresses}
            for address in self._sockets.keys() - self._addresses.values():
                self._sockets.pop(address).close()

    def close(self) -> None:
        self.keep(set())


def _answers(address: str) -> bool:
    """Whether somebody listens there, on this node. ZeroMQ would wait for somebody to do so, without a word."""
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # One that is stopped accepts nobody.
        probe.setblocking(False)
        try:
            probe.connect(address)
        except OSError:
            return False
    return True
