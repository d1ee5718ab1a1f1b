"""Where an instance's processes meet: socket files on one node, or encrypted TCP between nodes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import zmq


class Sockets(NamedTuple):
    """What the router binds with.

    Over TCP only those that were given the public key can connect: CurveZMQ's first message is boxed to it, and it is told
    to nobody but the instance's own actors.
    """

    directory: Path
    """That only its user can enter."""
    host: str = ""
    """Address to bind TCP ports at; empty: socket files."""
    public_key: bytes = b""
    secret_key: bytes = b""

    def endpoint(self, name: str) -> str:
        """What to bind for the connection `name`; the port is any that is free."""
        return f"tcp://{self.host}:0" if self.host else f"ipc://{self.directory}/{name}"


def open_sockets(directory: Path, host: str = "") -> Sockets:
    """With keys of their own, if they are of TCP."""
    keys = zmq.curve_keypair() if host else (b"", b"")
    return Sockets(directory, host, *keys)


def listen(socket: zmq.Socket[bytes], endpoint: str, secret_key: bytes = b"") -> str:
    """Binds `socket`. Returns where others find it."""
    if secret_key:
        socket.curve_server = True
        socket.curve_secretkey = secret_key
    socket.bind(endpoint)
    return socket.get_string(zmq.LAST_ENDPOINT) if endpoint.startswith("tcp") else endpoint


def connect(socket: zmq.Socket[bytes], endpoint: str, public_key: bytes = b"") -> None:
    """`public_key`: that of whoever listens."""
    if public_key:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = public_key
    socket.connect(endpoint)
