"""Drafts with an EAGLE head: rows of the verifier's hidden states, and guesses that go on from the head's own output."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import torch

from tailserve.engine.blocks import BlockPool
from tailserve.engine.model.branch_blocks import give_blocks
from tailserve.engine.model.proposals import Proposal, extend, runners_up
from tailserve.engine.model.spans import Span
from tailserve.engine.options import BRANCH_TOKENS
from tailserve.engine.speculation.drafter import (
    DraftResult,
    DraftRow,
    DraftWork,
    RowStates,
    StateMessage,
    with_others,
)

logger = logging.getLogger(__name__)

WINDOW = 512
"""Positions that the head looks back: about what it was trained on."""
EAGER_TOKENS = 16
"""So many tokens of one row, those of a prompt, are read as they come; fewer wait until a draft is asked for."""
KIND = "eagle"
LEAST_BESIDE = 0.05
"""Likelihood of a first token beside the first draft's: it takes no step of the head, but two places in the verifier's."""


class HeadModel(Protocol):
    """Computes the head. The caller owns the blocks of its cache."""

    num_blocks: int
    block_size: int

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """A state [n, C] for each token's hidden states [n, F * C] of the verifier."""

    def copy_block(self, source: int, target: int) -> None:
        """Copies keys and values of one block of the cache to another."""

    def step(self, spans: Sequence[Span], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output [R, C] and float32 logits [R, draft vocab] of the last `num_logits` tokens of each span.

        A span's tokens are those behind the `states` [T, C].
        """


@dataclass
class _Row:
    """Positions from `start` on: first those in the cache, then those whose states wait to be read."""

    start: int
    num_cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    """Of the waiting: the token behind each."""
    states: list[torch.Tensor] = field(default_factory=list)
    """Of the waiting, fused: [n, C] each."""
    block_ids: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.num_cached + len(self.token_ids)


class Chain(Proposal):
    """A draft that goes on from the head's own output."""

    def __init__(self, asked: DraftRow, row: _Row, *, beside: bool = False) -> None:
        """`beside`: a branch beside the row's first draft."""
        super().__init__(asked, KIND)
        self.cached = row
        self.beside = beside
        self.block_ids = row.block_ids
        self.own: list[int] = []
        """Blocks of a branch, which shares its row's full ones."""
        self.place = 0
        """Its place among the states of the last step that it was part of."""

    def goes_on(self) -> bool:
        """See `Proposal.goes_on`; a branch costs a token more than it has."""
        return super().goes_on() and (not self.beside or self.survival >= 2 * self.row.least)

    def next_span(self) -> Span:
        return Span(self.token_ids[-1:], self.cached.num_cached + len(self.token_ids) - 1, self.block_ids, 1)


class EagleDrafter:
    """`tailserve.engine.speculation.drafter.DraftModel`. A row whose states are missing gets no draft until they come.

    A row begins with the first states that arrive for it (a cached prompt has none) and begins anew behind a gap.
    """

    def __init__(
        self, model: HeadModel, tokens: Sequence[int], successors: SimpleQueue[Callable[[], HeadModel]] | None = None
    ) -> None:
        """`tokens`: the verifier's ids of the tokens that the head knows. `successors`: makers of models of the same cache,
        to be used from then on; rows begin anew there."""
        self._model = model
        self._successors = successors
        self._tokens = tokens
        self._pool = BlockPool(model.num_blocks, model.block_size, enable_prefix_caching=False)
        self._rows: dict[int, _Row] = {}
        self.last_step = -1
        """The newest step whose states are here."""

    @torch.inference_mode()
    def take(self, message: StateMessage) -> None:
        """Keeps states; those of prompts are read at once, so that the first draft need not."""
        self._change_over()
        self.last_step = message.step
        for number in list(self._rows) if message.fresh else message.leaves:
            self._drop(number)
        for entry in message.rows:
            row = self._rows.get(entry.row)
            if row is None or row.end != entry.start:
                self._drop(entry.row)
                row = self._rows[entry.row] = _Row(entry.start)
            row.token_ids += entry.next_tokens
            row.states.append(self._fuse(entry))
            if not self._reserve(row, 0):
                self._drop(entry.row)
            elif len(row.token_ids) >= EAGER_TOKENS:
                self._read_ahead(row)

    @torch.inference_mode()
    def run(self, work: DraftWork) -> DraftResult:
        """See `DraftModel.run`."""
        begin = time.perf_counter()
        chains = self.begin(work)
        self.go_on([chain for found in chains.values() for chain in found])
        drafts = {number: with_others([chain.draft for chain in found], len(found)) for number, found in chains.items()}
        return DraftResult(work.number, drafts, time.perf_counter() - begin)

    @torch.inference_mode()
    def begin(self, work: DraftWork) -> dict[int, list[Chain]]:
        """Row to drafts of one token, the likeliest first, for rows whose states are there. Forgets rows that ended."""
        for number in work.leaves:
            self._drop(number)
        chains = {}
        for entry in work.rows:
            row = self._rows.get(entry.row)
            base_len = entry.keep + len(entry.token_ids)
            if row is not None and row.token_ids and row.end == base_len - 1 and self._reserve(row, entry.num_tokens):
                chains[entry.row] = [Chain(entry, row)]
        if not chains:
            return {}
        states, logits = self._read([found[0].cached for found in chains.values()])
        self._add([found[0] for found in chains.values()], states, logits)
        for found, own in zip(chains.values(), logits, strict=True):
            asked = found[0].row
            for column, confidence in runners_up(own, asked.width - 1) if asked.width > 1 else ():
                if confidence >= min(LEAST_BESIDE, 2 * asked.least):
                    found.append(self._beside(found[0], column, confidence))
        return chains

    def _beside(self, first: Chain, column: int, confidence: float) -> Chain:
        branch = Chain(first.row, first.cached, beside=True)
        branch.place = first.place
        branch.limit = min(branch.limit, BRANCH_TOKENS)
        branch.add(self._tokens[column], confidence, column)
        return branch

    @torch.inference_mode()
    def go_on(self, chains: Sequence[Chain]) -> None:
        """Adds tokens while they are likely enough to be reached, and not too many. Takes what `begin` made, or a part."""
        alive = [chain for chain in chains if chain.goes_on() and (not chain.beside or self._place(chain))]
        while alive:
            states = self._states[[chain.place for chain in alive]]
            self._add(alive, *self._model.step([chain.next_span() for chain in alive], states))
            alive = [chain for chain in alive if chain.goes_on()]
        for chain in chains:
            self._pool.release(chain.own)

    def _place(self, branch: Chain) -> bool:
        row = branch.cached
        return give_blocks(branch, row.block_ids, row.num_cached, self._pool, self._model.copy_block)

    def _add(self, chains: Sequence[Chain], states: torch.Tensor, logits: torch.Tensor) -> None:
        self._states = states
        extend(chains, logits, self._tokens)
        for place, chain in enumerate(chains):
            chain.place = place

    def _read(self, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts waiting states into the cache; what the head makes of the last of each."""
        spans = [Span(row.token_ids, row.num_cached, row.block_ids, 1) for row in rows]
        result = self._model.step(spans, torch.cat([states for row in rows for states in row.states]))
        for row in rows:
            row.num_cached += len(row.token_ids)
            row.token_ids, row.states = [], []
        return result

    def _read_ahead(self, row: _Row) -> None:
        """All that waits but the last, which the first draft begins with."""
        states, last = torch.cat(row.states), row.token_ids.pop()
        row.states = [states[:-1]]
        self._read([row])
        row.token_ids, row.states = [last], [states[-1:]]

    def _change_over(self) -> None:
        if self._successors is None or self._successors.empty():
            return
        self._model = self._successors.get()()
        for number in list(self._rows):
            self._drop(number)
        logger.info("the compiled draft takes over")

    def _fuse(self, entry: RowStates) -> torch.Tensor:
        features = torch.frombuffer(bytearray(entry.data), dtype=torch.bfloat16)
        return self._model.fuse(features.view(len(entry.next_tokens), -1))

    def _reserve(self, row: _Row, more: int) -> bool:
        size = self._pool.block_size
        need = math.ceil((row.num_cached + len(row.token_ids) + more) / size) - len(row.block_ids)
        if need > self._pool.num_free:
            return False
        row.block_ids += self._pool.allocate(max(need, 0))
        return True

    def _drop(self, number: int) -> None:
        row = self._rows.pop(number, None)
        if row is not None:
            self._pool.release(row.block_ids)
