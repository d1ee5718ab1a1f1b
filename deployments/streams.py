"""Tokens on their way out of a router: one message per engine step and ingress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import msgspec

from tailserve.deployments.tokens import TokenOutlets
from tailserve.engine.errors import NotReadyError
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import TokenChunk

LINGER_S = 0.2
"""A stream without requests stays open this long, so that a chat's next request finds it."""
BEAT_S = 2.0
"""With nothing to say for this long, a stream with open requests says that: who reads it knows that its instance lives."""
ORPHAN_S = 10.0
"""Requests whose ingress never opened its stream, or lost it, are given up after this long."""


class StepMessage(msgspec.Struct, frozen=True, array_like=True):
    """What one step made for the requests of one ingress, and how busy the instance is."""

    chunks: list[TokenChunk]
    load: InstanceLoad


class Outbox:
    """Messages for one ingress, in order. Lives on the event loop."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.num_open = 0
        """Requests of this ingress that have not ended."""
        self.changed = asyncio.Event()
        self.readers = 0
        self.unread_since = asyncio.get_running_loop().time()

    def put(self, data: bytes) -> None:
        self.messages.append(data)
        self.changed.set()


class Outboxes:
    """All ingresses of one router. The engine's thread publishes; streams read on the event loop."""

    def __init__(self, instance: str = "") -> None:
        """`instance`: what ingresses know this router by."""
        self._loop = asyncio.get_running_loop()
        self._outlets = TokenOutlets(instance)
        self._boxes: dict[str, Outbox] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def connect(self, ingress: str, address: str) -> None:
        """Its tokens go straight to `address` where that is on this node, and its stream only says that this router lives.

        To be called before a request of it could publish anything.
        """
        self._outlets.connect(ingress, address)

    def open_request(self, ingress: str) -> None:
        """Counts a request of this ingress; its stream stays open until the request ends."""
        box = self._boxes.get(ingress)
        if box is None:
            box = self._boxes[ingress] = Outbox()
        box.num_open += 1
        if box.readers == 0:
            box.unread_since = self._loop.time()

    def publish(self, by_ingress: Mapping[str, list[TokenChunk]], load: InstanceLoad) -> None:
        """Called by the engine's thread with what a step made: one message for each ingress, and one hop between threads."""
        messages = []
        for ingress, chunks in by_ingress.items():
            data = self._encoder.encode(StepMessage(chunks, load))
            num_ended = sum(chunk.finish_reason is not None for chunk in chunks)
            sent = self._outlets.send(ingress, data)
            if num_ended or not sent:
                messages.append((ingress, None if sent else data, num_ended))
        if messages:
            self._loop.call_soon_threadsafe(self._deliver, messages)

    def _deliver(self, messages: list[tuple[str, bytes | None, int]]) -> None:
        for ingress, data, num_ended in messages:
            box = self._boxes.get(ingress)
            if box is not None:
                box.num_open -= num_ended
                if data is not None:
                    box.put(data)

    async def read(self, ingress: str) -> AsyncIterator[bytes]:
        """The ingress's messages until it has no more requests here and `LINGER_S` has passed; an empty one each `BEAT_S`
        in which there is none.

        NotReadyError if nothing is known of the ingress: its requests were given up.
        """
        box = self._boxes.get(ingress)
        if box is None:
            raise NotReadyError("this instance has no requests of the ingress any more")
        box.readers += 1
        said_s = self._loop.time()
        try:
            while True:
                box.changed.clear()
                messages, box.messages = box.messages, []
                for data in messages:
                    yield data
                if messages:
                    said_s = self._loop.time()
                    continue
                if self._loop.time() > said_s + BEAT_S:
                    said_s = self._loop.time()
                    yield b""
                try:
                    await asyncio.wait_for(box.changed.wait(), LINGER_S)
                except TimeoutError:
                    if box.num_open == 0 and not box.messages:
                        self._boxes.pop(ingress, None)
                        return
        finally:
            box.readers -= 1
            box.unread_since = self._loop.time()

    def orphans(self) -> list[str]:
        """Ingresses with open requests that nobody has been reading for `ORPHAN_S`. Their boxes are dropped."""
        now = self._loop.time()
        lost = [ingress for ingress, box in self._boxes.items() if box.readers == 0 and now - box.unread_since > ORPHAN_S]
        for ingress in lost:
            del self._boxes[ingress]
        self._outlets.keep(set(self._boxes))
        return lost

    def close(self) -> None:
        self._outlets.close()
