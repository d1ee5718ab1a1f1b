"""Drafts for everything that may come of a step, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

from tailserve.engine.blocks import BlockPool
from tailserve.engine.model.branch_blocks import give_blocks
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.proposals import Proposal, extend
from tailserve.engine.model.spans import Span
from tailserve.engine.model.vocabulary import VocabularyMap
from tailserve.engine.speculation.drafter import Draft, DraftRow, Outcome


class Branch(Proposal):
    """A draft behind one outcome. It shares its row's full blocks; the others are its own."""

    def __init__(
        self, row: DraftRow, accepted: int, token_id: int, column: int, start: int, kind: str, *, confidence: float = 1.0
    ) -> None:
        """The outcome's last token is `token_id`, behind `accepted` draft tokens. The draft model calls it `column`, and it
        stands at position `start` there. `confidence`: that it comes, where that matters."""
        super().__init__(row, kind, base_len=row.keep + len(row.token_ids) + accepted + 1)
        self.survival = self._confidence = confidence
        self.token_id, self.column, self.start = token_id, column, start
        self.block_ids: list[int] = []
        self.own: list[int] = []

    @property
    def whole(self) -> Draft:
        """The outcome's last token and what follows, as a draft."""
        draft = self.draft
        confidences = [self._confidence, *draft.confidences]
        return Draft(draft.base_len - 1, [self.token_id, *draft.token_ids], confidences, kind=draft.kind)

    def next_span(self, own: Sequence[int] | None) -> Span:
        columns = [self.column, *self.columns]
        last = columns[-1] if own is None else own[columns[-1]]
        return Span([last], self.start + len(self.columns), self.block_ids, 1)


def branch_out(
    row: DraftRow,
    known: int,
    draft: Sequence[int],
    fan_out: Sequence[int],
    likeliest: Sequence[Sequence[int]],
    names: Sequence[int] | None,
    kind: str,
) -> list[Branch]:
    """Branches of a row with `known` tokens in the draft's cache, whose `draft` is being verified.

    `likeliest`: for each number of accepted tokens, the columns that may come next, best first, max(fan_out) + 1 of them;
    `names`: the verifier's ids of all columns, None if they are these themselves.
    """
    branches = []
    for accepted, count in enumerate(fan_out):
        found = [(column if names is None else names[column], column) for column in likeliest[accepted]]
        # What was drafted there does not end its own acceptance.
        others = [(token, column) for token, column in found if token not in draft[accepted : accepted + 1]]
        branches += [Branch(row, accepted, token, column, known + accepted, kind) for token, column in others[:count]]
    return branches


def draft_branches(
    model: PagedModel,
    pool: BlockPool,
    branches: Sequence[tuple[Branch, Sequence[int]]],
    vocabulary: VocabularyMap | None,
) -> list[Outcome]:
    """Drafts greedily behind each branch; `branches` come with their row's blocks. Those without room are left out."""
    own, names = (None, None) if vocabulary is None else (vocabulary.own, vocabulary.names)
    placed = [branch for branch, blocks in branches if give_blocks(branch, blocks, branch.start, pool, model.copy_block)]
    alive = placed
    while alive:
        logits = model.forward([branch.next_span(own) for branch in alive])
        extend(alive, logits if own is None else logits[:, own], names)
        alive = [branch for branch in alive if branch.goes_on()]
    for branch in placed:
        pool.release(branch.own)
    return [Outcome(branch.row.row, branch.token_id, branch.draft) for branch in placed]
