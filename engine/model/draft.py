"""A draft model: greedy continuations from a small model with a paged KV cache of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer

from tailserve.engine.blocks import BlockPool, chain_hash
from tailserve.engine.model.branch_blocks import give_blocks
from tailserve.engine.model.branches import Branch, branch_out, draft_branches
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.proposals import Proposal, extend, runners_up
from tailserve.engine.model.spans import Span
from tailserve.engine.model.vocabulary import VocabularyMap, map_vocabularies
from tailserve.engine.options import BRANCH_TOKENS, LoadOptions
from tailserve.engine.speculation.drafter import (
    Draft,
    DraftResult,
    DraftRow,
    DraftWork,
    Outcome,
    StateMessage,
    with_others,
)

KIND = "model"


@dataclass
class _Row:
    given: list[int] = field(default_factory=list)
    """The verifier's tokens."""
    token_ids: list[int] = field(default_factory=list)
    """The same in the draft's vocabulary."""
    computed: list[int] = field(default_factory=list)
    """Tokens whose KV is in the cache; its tail may be drafts of an earlier round that did not hold."""
    block_ids: list[int] = field(default_factory=list)
    root: bytes = b""
    """Who has the same may share its blocks; empty: nobody."""

    def hashes(self, count: int, size: int) -> list[bytes]:
        """Of the first `count` blocks of so many of its tokens."""
        found, parent = [], self.root
        for begin in range(0, count * size, size):
            parent = chain_hash(parent, self.token_ids[begin : begin + size])
            found.append(parent)
        return found


class ModelDrafter:
    """Proposes the draft model's most likely tokens, or draws them where a row asks for that.

    A row that does not fit the pool or the round's token budget gets no draft this round; nothing else happens to it. What
    was computed of a row that left is found again by rows of the same root: later turns of its session, and whoever else
    shares its scope.
    """

    def __init__(
        self,
        model: PagedModel,
        *,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocabulary: VocabularyMap | None = None,
    ) -> None:
        """`vocabulary`: from the verifier's to the draft's, unless they are the same."""
        self._model = model
        self._budget = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._vocabulary = vocabulary
        self._pool = BlockPool(model.num_blocks, model.block_size)
        self._rows: dict[int, _Row] = {}

    def run(self, work: DraftWork) -> DraftResult:
        """See `DraftModel.run`."""
        begin = time.perf_counter()
        for number in work.leaves:
            row = self._rows.pop(number, None)
            if row is not None:
                self._leave(row)
        for entry in work.rows:
            row = self._rows.get(entry.row)
            if row is None:
                row = self._rows[entry.row] = _Row(root=entry.root)
                self._update(row, entry)
                self._find(row)
            else:
                self._update(row, entry)
        if work.outcomes:
            outcomes = self._foresee(work)
            return DraftResult(work.number, {}, time.perf_counter() - begin, outcomes)
        drafts = self._propose(work)
        return DraftResult(work.number, drafts, time.perf_counter() - begin)

    def _update(self, row: _Row, entry: DraftRow) -> None:
        if entry.keep != len(row.given):
            row.given = row.given[: entry.keep]
            row.token_ids = self._translate(row.given)
        row.given += entry.token_ids
        row.token_ids += self._translate(entry.token_ids)
        _roll_back(row)

    def _find(self, row: _Row) -> None:
        """Gives a new row the blocks that hold its beginning."""
        size = self._pool.block_size
        # The last token is computed in any case.
        count = (len(row.token_ids) - 1) // size if row.root else 0
        found = self._pool.match(row.hashes(count, size))
        row.block_ids = [block for block in found if block is not None]
        self._pool.acquire(row.block_ids)
        row.computed = row.token_ids[: len(row.block_ids) * size]

    def _leave(self, row: _Row) -> None:
        _roll_back(row)
        full = len(row.computed) // self._pool.block_size if row.root else 0
        for block, content in zip(row.block_ids, row.hashes(full, self._pool.block_size), strict=False):
            self._pool.register(block, content)
        self._pool.release(row.block_ids)

    def _translate(self, token_ids: list[int]) -> list[int]:
        return list(token_ids) if self._vocabulary is None else self._vocabulary.to_draft(token_ids)

    def take(self, message: StateMessage) -> None:
        """See `DraftModel.take`; a model of its own needs none."""

    def _propose(self, work: DraftWork) -> dict[int, Draft]:
        spans: dict[int, Span] = {}
        proposals: dict[int, Proposal] = {}
        refused: dict[int, Draft] = {}
        budget = self._budget
        for entry in work.rows:
            row = self._rows[entry.row]
            pending = row.token_ids[len(row.computed) :][:budget]
            if not self._reserve(row, len(row.token_ids) + entry.num_tokens - 1):
                # Nor will there be one if asked again, as it may be of rows that are missing.
                refused[entry.row] = Draft(entry.keep + len(entry.token_ids), [], kind=KIND)
                continue
            if not pending:
                continue
            budget -= len(pending)
            complete = len(row.computed) + len(pending) == len(row.token_ids)
            spans[entry.row] = Span(pending, len(row.computed), row.block_ids, int(complete))
            if complete:
                proposals[entry.row] = Proposal(entry, KIND)
        if not spans:
            return refused
        logits = self._forward(list(spans.values()))
        for number, span in spans.items():
            self._rows[number].computed += span.token_ids
        extend(list(proposals.values()), logits, self._names)
        branches = {
            number: self._beside(proposal, own) for (number, proposal), own in zip(proposals.items(), logits, strict=True)
        }
        self._go_on(proposals, [branch for some in branches.values() for branch in some])
        return refused | {
            number: with_others([proposal.draft, *(branch.whole for branch in branches[number])], proposal.row.width)
            for number, proposal in proposals.items()
        }

    def _beside(self, first: Proposal, logits: torch.Tensor) -> list[Branch]:
        """Branches that begin with the next most likely tokens."""
        entry = first.row
        if entry.width == 1 or entry.temperature > 0:
            return []
        row = self._rows[entry.row]
        # A branch costs a token more than it has.
        found = [(column, share) for column, share in runners_up(logits, entry.width - 1) if share >= 2 * entry.least]
        branches = []
        for column, share in found:
            token = column if self._names is None else self._names[column]
            branch = Branch(entry, 0, token, column, len(row.token_ids), KIND, confidence=share)
            branch.limit = min(branch.limit, BRANCH_TOKENS) - 1
            branches.append(branch)
        return branches

    def _go_on(self, proposals: dict[int, Proposal], branches: list[Branch]) -> None:
        """Adds tokens to all of them while they are likely enough to be reached, and not too many."""
        wanted = [branch for branch in branches if branch.goes_on()]
        blocks = {number: self._rows[number].block_ids for number in proposals}
        beside = [
            branch
            for branch in wanted
            if give_blocks(branch, blocks[branch.row.row], branch.start, self._pool, self._model.copy_block)
        ]
        own = None if self._vocabulary is None else self._vocabulary.own
        while True:
            alive = {number: proposal for number, proposal in proposals.items() if proposal.goes_on()}
            others = [branch for branch in beside if branch.goes_on()]
            spans = [self._next_span(number, proposal) for number, proposal in alive.items()]
            if not spans and not others:
                break
            logits = self._forward(spans + [branch.next_span(own) for branch in others])
            for number, span in zip(alive, spans, strict=False):
                self._rows[number].computed += span.token_ids
            extend([*alive.values(), *others], logits, self._names)
        for branch in beside:
            self._pool.release(branch.own)

    def _foresee(self, work: DraftWork) -> list[Outcome]:
        """One forward over what is being verified says what may come of it; see `draft_branches` for the rest."""
        asked, spans, parts, budget = [], [], [], self._budget
        for entry, outcome in zip(work.rows, work.outcomes, strict=True):
            row = self._rows[entry.row]
            draft = self._translate(outcome.draft)
            pending = row.token_ids[len(row.computed) :]
            whole = len(draft) == len(outcome.draft) and len(pending) + len(draft) <= budget
            # A long prompt is read in parts, its last token when there is something to ask.
            wanted = pending + draft if whole else pending[: min(budget, len(pending) - 1)]
            if not wanted or not self._reserve(row, len(row.computed) + len(wanted)):
                continue
            budget -= len(wanted)
            span = Span(wanted, len(row.computed), row.block_ids, len(draft) + 1 if whole else 0)
            if whole:
                asked.append((entry, outcome, row))
                spans.append(span)
            else:
                parts.append((row, span))
        if not spans and not parts:
            return []
        logits = self._forward([*spans, *(span for _, span in parts)])
        for row, span in parts:
            row.computed += span.token_ids
        branches, first = [], 0
        for (entry, outcome, row), span in zip(asked, spans, strict=True):
            row.computed += span.token_ids
            likeliest = logits[first : first + span.num_logits].topk(max(outcome.fan_out) + 1).indices.tolist()
            first += span.num_logits
            known = len(row.token_ids)
            if known + len(outcome.draft) + entry.num_tokens < self._max_model_len:
                found = branch_out(entry, known, outcome.draft, outcome.fan_out, likeliest, self._names, KIND)
                branches += [(branch, row.block_ids) for branch in found]
        return draft_branches(self._model, self._pool, branches, self._vocabulary)

    def _next_span(self, number: int, proposal: Proposal) -> Span:
        row, column = self._rows[number], proposal.columns[-1]
        own = column if self._vocabulary is None else self._vocabulary.own[column]
        return Span([own], len(row.computed), row.block_ids, 1)

    def _forward(self, spans: list[Span]) -> torch.Tensor:
        """Logits, of what the verifier knows as well."""
        logits = self._model.forward(spans)
        return logits if self._vocabulary is None else logits[:, self._vocabulary.own]

    @property
    def _names(self) -> list[int] | None:
        return None if self._vocabulary is None else self._vocabulary.names

    def _reserve(self, row: _Row, num_tokens: int) -> bool:
        if num_tokens > self._max_model_len:
            return False
        need = -(-num_tokens // self._pool.block_size) - len(row.block_ids)
        if need > self._pool.num_free:
            return False
        row.block_ids += self._pool.allocate(max(need, 0))
        return True


def _roll_back(row: _Row) -> None:
    """Keeps the KV of the tokens that turned out as they were drafted."""
    same = 0
    for old, new in zip(row.computed, row.token_ids, strict=False):
        if old != new:
            break
        same += 1
    # The last token is always computed again when nothing else is: its logits are needed.
    del row.computed[min(same, len(row.token_ids) - 1) :]


def load_drafter(options: LoadOptions, *, verifier: str, max_num_batched_tokens: int) -> ModelDrafter:
    """Loads a draft model for the verifier in the directory `verifier`. ConfigError if their vocabularies have too little
    in common."""
    model, info = load_model(options)
    vocabulary = None
    if verifier != options.path:
        vocabulary = map_vocabularies(AutoTokenizer.from_pretrained(verifier), AutoTokenizer.from_pretrained(options.path))
    return ModelDrafter(
        model, max_num_batched_tokens=max_num_batched_tokens, max_model_len=info.max_model_len, vocabulary=vocabulary
    )
