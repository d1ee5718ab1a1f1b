"""A draft model: greedy continuations from a small model with a paged KV cache of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from tailserve.engine.blocks import BlockPool
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.spans import Span
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork


@dataclass
class _Row:
    token_ids: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    """Tokens whose KV is in the cache; its tail may be drafts of an earlier round that did not hold."""
    block_ids: list[int] = field(default_factory=list)


class ModelDrafter:
    """Proposes the draft model's most likely tokens.

    A row that does not fit the pool or the round's token budget gets no draft this round; nothing else happens to it.
    """

    def __init__(self, model: PagedModel, *, max_num_batched_tokens: int, max_model_len: int) -> None:
        self._model = model
        self._budget = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._pool = BlockPool(model.num_blocks, model.block_size, enable_prefix_caching=False)
        self._rows: dict[int, _Row] = {}

    def run(self, work: DraftWork) -> DraftResult:
        for number in work.leaves:
            row = self._rows.pop(number, None)
            if row is not None:
                self._pool.release(row.block_ids)
        for entry in work.rows:
            row = self._rows.setdefault(entry.row, _Row())
            row.token_ids = row.token_ids[: entry.keep] + entry.token_ids
            _roll_back(row)
        drafts = self._propose(work)
        return DraftResult(work.step, {n: Draft(len(self._rows[n].token_ids), ids) for n, ids in drafts.items()})

    def _propose(self, work: DraftWork) -> dict[int, list[int]]:
        spans: dict[int, Span] = {}
        ready: list[int] = []
        budget = self._budget
        for entry in work.rows:
            row = self._rows[entry.row]
            pending = row.token_ids[len(row.computed) :][:budget]
            if not pending or not self._reserve(row, len(row.token_ids) + work.num_tokens - 1):
                continue
            budget -= len(pending)
            complete = len(row.computed) + len(pending) == len(row.token_ids)
            spans[entry.row] = Span(pending, len(row.computed), row.block_ids, int(complete))
            if complete:
                ready.append(entry.row)
        drafts: dict[int, list[int]] = {number: [] for number in ready}
        while spans:
            logits = self._model.forward(list(spans.values()))
            for number, span in spans.items():
                self._rows[number].computed += span.token_ids
            for number, token_id in zip(ready, logits.argmax(-1).tolist(), strict=True):
                drafts[number].append(token_id)
            unfinished = [number for number in ready if len(drafts[number]) < work.num_tokens]
            spans = {n: self._next_span(self._rows[n], drafts[n][-1]) for n in unfinished}
        return drafts

    @staticmethod
    def _next_span(row: _Row, token_id: int) -> Span:
        return Span([token_id], len(row.computed), row.block_ids, 1)

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
