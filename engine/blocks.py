"""KV blocks: who holds them, which can be found again by their content, and which to evict."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from tailserve.engine.host_tier import HostTier


def root_hash(scope: str, adapter: str = "") -> bytes:
    """The parent of a scope's first blocks. Blocks of different scopes or adapters never have equal hashes."""
    return blake2b(scope.encode(), digest_size=16, key=blake2b(adapter.encode(), digest_size=32).digest()).digest()


def join_hash(root: bytes, before: bytes) -> bytes:
    """The parent of a scope's first blocks behind blocks of another scope, of which `before` is the last."""
    return blake2b(before, digest_size=16, key=root).digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block: of everything before it (`parent`) and its tokens."""
    return blake2b(array("I", token_ids).tobytes(), digest_size=16, key=parent).digest()


class BlockPool:
    """Reference counts and contents of `num_blocks` KV blocks. It knows numbers only; the tensors are the verifier's.

    A block is *held* (its count is positive), or *free*. A free block with a hash is *cached*: it can be found again until
    it is needed for something else. Free blocks are taken in this order: those without a hash, then cached ones, least
    recently used first, then cached ones whose content is pinned, likewise. What cached ones hold may go to a second tier.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, host: HostTier | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self._host = host
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_reserved = 0
        """Of the free blocks, those that somebody was promised."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Free blocks whose content is pinned."""
        self.pins: Counter[bytes] = Counter()
        """Content to how often it is pinned, whether it is there or not."""

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._free) + len(self._kept) - self.num_reserved

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, or were promised, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def take(self, count: int) -> list[int] | None:
        """`allocate`, or None if there are not so many."""
        return self.allocate(count) if count <= self.num_free else None

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks with undefined content. The caller has checked `num_free`; IndexError otherwise."""
        if count > self.num_free:
            raise IndexError(f"{count} blocks asked, {self.num_free} free")
        taken = []
        for _ in range(count):
            block, _ = (self._free or self._kept).popitem(last=False)
            content = self._hashes[block]
            if content is not None:
                del self._by_hash[content]
                self._hashes[block] = None
                if self._host is not None:
                    self._host.save(block, content)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def match(self, hashes: Iterable[bytes]) -> list[int | None]:
        """The blocks that hold the longest known prefix of a chain of hashes; None for those in the second tier. Does not
        take them: see `acquire`."""
        found = []
        for content in hashes:
            block = self._by_hash.get(content)
            if block is None and (self._host is None or content not in self._host):
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Adds one holder to each block."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._line(block)[block]
            self._refs[block] += 1

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of these blocks are free, that is: what `acquire` would take out of `num_free`."""
        return sum(self._refs[block] == 0 for block in blocks)

    def count_needed(self, total: int, matched: Sequence[int | None]) -> int:
        """How many free blocks it takes to hold `total`, of which some were `match`ed."""
        here = [block for block in matched if block is not None]
        return total - len(here) + self.count_free(here)

    def fill(self, hashes: Sequence[bytes], most: int) -> tuple[list[int], int, list[int | None]]:
        """Takes blocks that hold the beginning of a chain: those that do, and free ones, up to `most`, that are filled from
        the second tier. Returns them, how many are filled, and the `match`ed that are left for the next time."""
        assert self._host is not None
        matched = self.match(hashes)
        count, moves, room = 0, 0, self.num_free
        for block in matched:
            moves += block is None
            room -= block is None or self._refs[block] == 0
            if moves > most or room < 0:
                break
            count += 1
        rest = matched[count:] if room >= 0 else []
        matched = matched[:count]
        here = [block for block in matched if block is not None]
        self.acquire(here)
        self._host.touch(hashes)
        # All at once, so that what has to go is moved before anything is loaded.
        fresh = iter(self.allocate(len(matched) - len(here)))
        blocks = [next(fresh) if block is None else block for block in matched]
        filled = 0
        for place, block in enumerate(matched):
            if block is not None:
                continue
            if not self._host.load(hashes[place], blocks[place]):
                # It was there, but what had to go took its place.
                self.release(blocks[place:])
                return blocks[:place], filled, []
            self.register(blocks[place], hashes[place])
            filled += 1
        return blocks, filled, rest

    def release(self, blocks: Sequence[int]) -> None:
        """Removes one holder from each block. The last of a prefix becomes the first to be evicted."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._line(block)[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, content: bytes) -> None:
        """Makes a full block of verified tokens findable. A second block of the same content stays anonymous."""
        if self._caching and self._hashes[block] is None and content not in self._by_hash:
            self._hashes[block] = content
            self._by_hash[content] = block

    def pin(self, hashes: Iterable[bytes]) -> None:
        """Blocks with this content are taken last, until `unpin` is called as often."""
        for content in hashes:
            self.pins[content] += 1
            block = self._by_hash.get(content)
            if block is not None and block in self._free:
                del self._free[block]
                self._kept[block] = None

    def unpin(self, hashes: Iterable[bytes]) -> None:
        """Undoes `pin`. What is free then counts as used just now."""
        for content in hashes:
            self.pins[content] -= 1
            if not self.pins[content]:
                del self.pins[content]
                block = self._by_hash.get(content)
                if block is not None and block in self._kept:
                    del self._kept[block]
                    self._free[block] = None

    def drop(self, hashes: Iterable[bytes]) -> int:
        """This content cannot be found any more; the blocks that nobody holds are the first to be taken. Returns how many
        blocks had it."""
        count = 0
        for content in hashes:
            block = self._by_hash.get(content)
            if block is None:
                continue
            count += 1
            line = self._line(block)
            del self._by_hash[content]
            self._hashes[block] = None
            if block in line:
                del line[block]
                self._free[block] = None
                self._free.move_to_end(block, last=False)
        return count

    def forget(self) -> None:
        """The KV tensors are gone: no content can be found any more. Holders stay; release them first."""
        self._by_hash.clear()
        self._hashes = [None] * self.num_blocks
        self._free.update(self._kept)
        self._kept.clear()

    def check_integrity(self, holders: Iterable[Sequence[int]], num_reserved: int = 0) -> None:
        """Every block is free or held, exactly as often as the holders' tables say, and so many free ones are reserved.
        AssertionError names what is not."""
        assert self.num_reserved == num_reserved, f"{num_reserved} blocks reserved, {self.num_reserved} counted"
        assert self.num_free >= 0, "more blocks are reserved than are free"
        expected = Counter(block for table in holders for block in table)
        for block, refs in enumerate(self._refs):
            assert refs == expected[block], f"block {block}: {refs} references counted, {expected[block]} held"
            lines = (block in self._free) + (block in self._kept)
            assert lines == (refs == 0), f"block {block}: {refs} references, and in {lines} lines of free ones"
            assert refs or (block in self._line(block)), f"block {block} is in the wrong line of free ones"
        hashed = {block for block, content in enumerate(self._hashes) if content is not None}
        assert hashed == set(self._by_hash.values()), "the hash index and the blocks disagree"
        assert len(hashed) == len(self._by_hash), "two hashes name one block"

    def _line(self, block: int) -> OrderedDict[int, None]:
        """Where a block belongs while it is free."""
        content = self._hashes[block]
        return self._free if content is None or content not in self.pins else self._kept
