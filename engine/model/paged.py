"""Models over a paged KV cache: packed sequences in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from tailserve.engine.model.attention import AttentionBackend, KVCache, PackedSequences, PagedContext
from tailserve.engine.model.spans import Span, pack
from tailserve.engine.speculation.sampling import pick


class PagedModel(Protocol):
    """Runs packed batches. The caller owns the blocks; the model owns the memory behind them."""

    backend: str
    """What computes attention, by name."""
    num_blocks: int
    block_size: int

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """Computes all spans at once and stores their keys and values.

        Returns float32 logits [sum of num_logits, vocab], span after span.
        """

    def pick(self, logits: torch.Tensor, temperatures: Sequence[float], keys: np.ndarray) -> torch.Tensor:
        """See `tailserve.engine.speculation.sampling.pick`. `logits` are what `forward` returned, or changed in place."""


class TransformersModel:
    """A `PagedModel` that runs transformers' own modules, with paged attention in each layer. For any device."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, backend: AttentionBackend) -> None:
        self._model = model
        self.cache = cache
        self._backend = backend
        self._device = model.device
        self.backend = backend.name
        self.num_blocks, self.block_size = cache.num_blocks, cache.block_size

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`."""
        batch = pack(spans, self.block_size)
        sequences = PackedSequences(batch.query_starts, batch.context_lens, batch.block_tables, self._tensor(batch.slots))
        return self._logits(
            self._tensor(batch.token_ids),
            self._tensor(batch.positions),
            self._tensor(batch.wanted.astype(np.int64)),
            PagedContext(self.cache, self._backend, sequences),
        )

    def _logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor, paged: PagedContext
    ) -> torch.Tensor:
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted,
            paged=paged,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def prepare(self) -> None:
        """Called once, when the model is known to be right."""

    def pick(self, logits: torch.Tensor, temperatures: Sequence[float], keys: np.ndarray) -> torch.Tensor:
        """See `PagedModel.pick`."""
        return pick(logits, temperatures, keys)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
