"""Blocks for a sequence that branches off another: the full ones are shared, what is in the last one is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


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
    copy: Callable[[int, int], None],
) -> BranchBlocks | None:
    """For `count` tokens from position `start` on, behind those in `blocks` of `size` tokens.

    `take` gives so many blocks, or None if there are not so many, in which case there is no branch; `copy` copies one.
    """
    full, begun = divmod(start, size)
    own = take(-(-(begun + count) // size))
    if own is None:
        return None
    if begun:
        copy(blocks[full], own[0])
    return BranchBlocks([*blocks[:full], *own], own)
