"""The second tier of KV blocks: what the device has no room for goes to host memory, and comes back from there."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from tailserve.engine.types import BlockMove


class HostTier:
    """Which content is in which of `num_blocks` blocks of host memory. It knows numbers only.

    Content that somebody keeps goes there when its block on the device is needed for something else, and stays until
    nobody keeps it any more, or until others were used later and need the place. The verifier makes the moves, one after
    the other, before it computes the step that they are sent with: so a block may be moved out and used in the same step.
    """

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.moves: list[BlockMove] = []
        """Of the next step."""
        self._kept: Counter[bytes] = Counter()
        """Content to how many may want it again."""
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        """Content to host block, by last use."""
        self._free = self._all_free()

    @property
    def usage(self) -> float:
        """Share of the blocks that hold something, 0 to 1."""
        return len(self._blocks) / self.num_blocks if self.num_blocks else 0.0

    def keep(self, hashes: Iterable[bytes]) -> None:
        """This content is worth a place here, until `release` is called as often."""
        if self.num_blocks:
            self._kept.update(hashes)

    def release(self, hashes: Iterable[bytes]) -> int:
        """Undoes `keep`. What nobody keeps any more is gone; returns how many blocks had it."""
        before = len(self._free)
        for content in hashes if self.num_blocks else ():
            self._kept[content] -= 1
            if not self._kept[content]:
                del self._kept[content]
                block = self._blocks.pop(content, None)
                if block is not None:
                    self._free.append(block)
        return len(self._free) - before

    def save(self, block: int, content: bytes) -> None:
        """A block of the device is needed for something else; its content comes here if anybody keeps it."""
        if content not in self._kept:
            return
        if content in self._blocks:
            self._blocks.move_to_end(content)
            return
        host_block = self._free.pop() if self._free else self._blocks.popitem(last=False)[1]
        self._blocks[content] = host_block
        self.moves.append(BlockMove(block, host_block, to_host=True))

    def __contains__(self, content: bytes) -> bool:
        return content in self._blocks

    def touch(self, hashes: Sequence[bytes]) -> None:
        """This content, in the order of its chain, is about to be loaded: others give way first, and of it the last."""
        for content in reversed(hashes):
            if content in self._blocks:
                self._blocks.move_to_end(content)

    def load(self, content: bytes, block: int) -> bool:
        """Copies content to a block of the device. False if it is not here."""
        host_block = self._blocks.get(content)
        if host_block is None:
            return False
        self.moves.append(BlockMove(block, host_block, to_host=False))
        return True

    def take_moves(self) -> list[BlockMove]:
        """What the next step is to move."""
        moves, self.moves = self.moves, []
        return moves

    def forget(self) -> None:
        """The verifier and its host memory are gone."""
        self.moves.clear()
        self._blocks.clear()
        self._free = self._all_free()

    def _all_free(self) -> list[int]:
        """The first is taken first: the memory of the others may not be there yet."""
        return list(reversed(range(self.num_blocks)))

    def check_integrity(self, kept: Counter[bytes]) -> None:
        """Every block is free or has one content, which is `kept` as often as is counted. AssertionError otherwise."""
        assert sorted([*self._free, *self._blocks.values()]) == list(range(self.num_blocks)), "a host block is lost"
        if self.num_blocks:
            assert kept == self._kept, "kept content and those who keep it disagree"
        assert self._blocks.keys() <= self._kept.keys(), "a host block has what nobody keeps"
