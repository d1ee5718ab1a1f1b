"""A transformers model over a paged KV cache: packed sequences in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from tailserve.engine.model.attention import AttentionBackend, KVCache, PackedSequences, PagedContext


@dataclass(frozen=True)
class Span:
    """A stretch of one sequence to compute."""

    token_ids: Sequence[int]
    start: int
    """Position of the first token; everything before it is in the cache."""
    block_ids: Sequence[int]
    num_logits: int
    """Logits are wanted for this many tokens at the end."""


class PagedModel:
    """Runs packed batches. The caller owns the blocks; this class owns the tensors behind them."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, backend: AttentionBackend) -> None:
        self.model = model
        self.cache = cache
        self.backend = backend
        self.device = model.device

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """Computes all spans at once and stores their keys and values.

        Returns float32 logits [sum of num_logits, vocab], span after span.
        """
        lengths = np.array([len(span.token_ids) for span in spans], np.int32)
        starts = np.array([span.start for span in spans], np.int32)
        query_starts = np.zeros(len(spans) + 1, np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        tables = np.zeros((len(spans), max(len(span.block_ids) for span in spans)), np.int32)
        for index, span in enumerate(spans):
            tables[index, : len(span.block_ids)] = span.block_ids
        owner = np.repeat(np.arange(len(spans)), lengths)
        positions = np.arange(len(owner)) - query_starts[owner] + starts[owner]
        size = self.cache.block_size
        slots = tables[owner, positions // size].astype(np.int64) * size + positions % size
        ends = query_starts[1:]
        wanted = np.concatenate([np.arange(end - span.num_logits, end) for end, span in zip(ends, spans, strict=True)])
        sequences = PackedSequences(query_starts, starts + lengths, tables, self._tensor(slots))
        token_ids = np.concatenate([np.asarray(span.token_ids, np.int64) for span in spans])
        output = self.model(
            input_ids=self._tensor(token_ids).unsqueeze(0),
            position_ids=self._tensor(positions.astype(np.int64)).unsqueeze(0),
            use_cache=False,
            logits_to_keep=self._tensor(wanted.astype(np.int64)),
            paged=PagedContext(self.cache, self.backend, sequences),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
