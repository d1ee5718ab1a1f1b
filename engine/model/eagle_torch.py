"""The EAGLE head's step in PyTorch, for any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tailserve.engine.model.attention import AttentionBackend, KVCache, Options, PackedSequences
from tailserve.engine.model.eagle import EagleHead
from tailserve.engine.model.linear import prepack
from tailserve.engine.model.spans import Span, pack


class TorchHead:
    """`tailserve.engine.model.eagle_drafter.HeadModel`."""

    def __init__(
        self,
        head: EagleHead,
        embedding: torch.Tensor,
        lm_head: torch.Tensor,
        backend: AttentionBackend,
        *,
        num_blocks: int,
        block_size: int,
        window: int,
    ) -> None:
        """`embedding` [vocab, C] and `lm_head` [draft vocab, C] are of one type and device."""
        config, dtype = head.config, embedding.dtype
        self.num_blocks, self.block_size = num_blocks, block_size
        self._head = head.to(dtype)
        self._lm_head = nn.Linear(config.hidden_size, len(lm_head), bias=False, dtype=dtype)
        self._lm_head.weight = nn.Parameter(lm_head, requires_grad=False)
        self._parts = nn.ModuleList([self._head, self._lm_head])
        prepack(self._parts)
        self._embedding = embedding
        self._backend = backend
        self._options = Options(config.head_dim**-0.5, sliding_window=window)
        self._cache = KVCache(
            num_layers=1,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=embedding.device,
        )

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """See `HeadModel.fuse`."""
        return self._head.states(features.to(self._embedding.device))

    def copy_block(self, source: int, target: int) -> None:
        """See `HeadModel.copy_block`."""
        for side in (self._cache.keys[0], self._cache.values[0]):
            side[target] = side[source]

    def step(self, spans: Sequence[Span], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `HeadModel.step`."""
        batch = pack(spans, self.block_size)
        device = states.device
        embeddings = nn.functional.embedding(torch.from_numpy(batch.token_ids).to(device), self._embedding)
        positions = torch.from_numpy(batch.positions).to(device)
        query, key, value, residual = self._head.project(embeddings, states, positions)
        slots = torch.from_numpy(batch.slots).to(device)
        self._cache.write(0, slots, key, value)
        sequences = PackedSequences(batch.query_starts, batch.context_lens, batch.block_tables, slots)
        attended = self._backend.attend(query, self._cache, 0, sequences, self._options)
        out = self._head.finish(residual, attended.flatten(1))[torch.from_numpy(batch.wanted).to(device)]
        return out, self._lm_head(self._head.final_norm(out)).float()
