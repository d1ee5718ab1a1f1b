"""Several drafts for one place of a row, verified in one forward: each further one on spare blocks of its own.

A branch is one more sequence of the forward. It shares the row's full blocks; what the row has in its last block is copied.
So no attention mask is needed, whatever computes attention. The step afterwards copies what held back into the row's own
blocks, and nobody else knows that there were others.
"""

from __future__ import annotations

from collections.abc import Sequence

from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.rows import RowWork
from tailserve.engine.model.spans import Span


class Chain:
    """A row's draft, or one of its branches, as a part of a forward."""

    def __init__(self, entry: RowWork, draft: Sequence[int], span: Span, own: Sequence[int] = ()) -> None:
        """`own`: spare blocks, of a branch."""
        self.entry, self.draft, self.span, self.own = entry, draft, span, own


def first_chain(entry: RowWork) -> Chain:
    """A row's known tokens, and its draft."""
    wanted = len(entry.draft) + 1 if entry.samples else 0
    return Chain(entry, entry.draft, Span(entry.token_ids, entry.start, entry.row.block_ids, wanted))


def fork(model: PagedModel, work: Sequence[RowWork], spares: Sequence[int]) -> list[Chain]:
    """Chains for the branches of a batch; those for which there are no `spares` are left out."""
    chains: list[Chain] = []
    free = list(spares)
    for entry in work:
        full, begun = divmod(entry.start, model.block_size)
        for branch in entry.branches:
            need = -(-(begun + 1 + len(branch)) // model.block_size)
            if need > len(free):
                return chains
            own, free = free[:need], free[need:]
            if begun:
                model.copy_block(entry.row.block_ids[full], own[0])
            blocks = [*entry.row.block_ids[:full], *own]
            span = Span([*entry.token_ids[:1], *branch], entry.start, blocks, len(branch) + 1)
            chains.append(Chain(entry, branch, span, own))
    return chains


def keep(model: PagedModel, chain: Chain, num_held: int) -> None:
    """Makes a branch of which `num_held` draft tokens hold the row's own."""
    entry, size = chain.entry, model.block_size
    first, last = entry.start // size, (entry.start + num_held) // size
    for own, place in zip(chain.own, range(first, last + 1), strict=False):
        model.copy_block(own, entry.row.block_ids[place])
