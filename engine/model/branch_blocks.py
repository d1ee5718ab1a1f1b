"""Blocks for a sequence that branches off another: the full ones are shared, what is in the last one is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from tailserve.engine.blocks import BlockPool

Copy = Callable[[int, int], None]
"""Copies one block to another."""


class BranchBlocks(NamedTuple):
    """A branch's block table, and the blocks in it that are its own."""

    table: list[int]
    own: list[int]


def branch_blocks(
    blocks: Sequence[int],
    start: int,
    count: int,
    size: int,
    take: Callable[[int], list[int] | None],
    copy: Copy,
) -> BranchBlocks | None:
    """For `count` tokens from position `start` on, behind those in `blocks` of `size` tokens.

    `take` gives so many blocks, or None if there are not so many, in which case there is no branch.
    """
    full, begun = divmod(start, size)
    own = take(-(-(begun + count) // size))
    if own is None:
        return None
    if begun:
        copy(blocks[full], own[0])
    return BranchBlocks([*blocks[:full], *own], own)


class _Branch(Protocol):
    limit: int
    block_ids: list[int]
    own: list[int]


def give_blocks(branch: _Branch, blocks: Sequence[int], start: int, pool: BlockPool, copy: Copy) -> bool:
    """Gives a draft of up to `limit` tokens its blocks from a pool; False if there are none."""
    found = branch_blocks(blocks, start, branch.limit, pool.block_size, pool.take, copy)
    if found is not None:
        branch.block_ids, branch.own = found
    return found is not None
