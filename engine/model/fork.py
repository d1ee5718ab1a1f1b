"""Several drafts for one place of a row, verified in one forward: each further one on spare blocks of its own.

A branch is one more sequence of the forward. It shares the row's full blocks; what the row has in its last block is copied.
So no attention mask is needed, whatever computes attention. The step afterwards copies what held back into the row's own
blocks, and nobody else knows that there were others.
"""

from __future__ import annotations

from collections.abc import Sequence

from tailserve.engine.model.branch_blocks import branch_blocks
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.rows import RowWork
from tailserve.engine.model.spans import Span


class Strand:
    """A row's draft, or one of its branches, as a part of a forward."""

    def __init__(self, entry: RowWork, draft: Sequence[int], span: Span, own: Sequence[int] = ()) -> None:
        """`own`: spare blocks, of a branch."""
        self.entry, self.draft, self.span, self.own = entry, draft, span, own


def first_strand(entry: RowWork) -> Strand:
    """A row's known tokens, and its draft."""
    wanted = len(entry.draft) + 1 if entry.samples else 0
    return Strand(entry, entry.draft, Span(entry.token_ids, entry.start, entry.row.block_ids, wanted))


def fork(model: PagedModel, work: Sequence[RowWork], spares: Sequence[int]) -> list[Strand]:
    """Strands for the branches of a batch; those for which there are no `spares` are left out."""
    strands: list[Strand] = []
    free = list(spares)

    def take(count: int) -> list[int] | None:
        taken, free[:] = free[:count], free[count:]
        return taken if len(taken) == count else None

    for entry in work:
        for branch in entry.branches:
            count = 1 + len(branch)
            found = branch_blocks(entry.row.block_ids, entry.start, count, model.block_size, take, model.copy_block)
            if found is not None:
                span = Span([*entry.token_ids[:1], *branch], entry.start, found.table, count)
                strands.append(Strand(entry, branch, span, found.own))
    return strands


def keep(model: PagedModel, strand: Strand, num_held: int) -> None:
    """Makes a branch of which `num_held` draft tokens hold the row's own."""
    entry, size = strand.entry, model.block_size
    first, last = entry.start // size, (entry.start + num_held) // size
    for own, place in zip(strand.own, range(first, last + 1), strict=False):
        model.copy_block(own, entry.row.block_ids[place])
