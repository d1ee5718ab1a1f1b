"""Models over a paged KV cache: packed sequences in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from tailserve.engine.model.attention import AttentionBackend, KVCache, PackedSequences, PagedContext
from tailserve.engine.model.spans import PackedSpans, Span, pack
from tailserve.engine.speculation.sampling import pick


class PagedModel(Protocol):
    """Runs packed batches. The caller owns the blocks; the model owns the memory behind them."""

    backend: str
    """What computes attention, by name."""
    num_blocks: int
    block_size: int

    @property
    def features(self) -> torch.Tensor | None:
        """What `tap` asked for, of the tokens of the last `forward`, in their order; None without."""

    def tap(self, layers: Sequence[int]) -> None:
        """From now on `features` holds hidden states [tokens, len(layers) * hidden size]: each token's residual stream as it
        leaves these layers, counted from 0."""

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """Computes all spans at once and stores their keys and values.

        Returns float32 logits [sum of num_logits, vocab], span after span. The next call may write over them.
        """

    def copy_block(self, source: int, target: int) -> None:
        """Copies keys and values of one block to another, in every layer."""

    def kv_parts(self) -> list[torch.Tensor]:
        """Keys and values of each layer as they lie in memory, [blocks, ...] each."""

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
        self.features: torch.Tensor | None = None
        self._tapped: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def tap(self, layers: Sequence[int]) -> None:
        """See `PagedModel.tap`."""
        for hook in self._hooks:
            hook.remove()
        body: Any = self._model.get_decoder()  # type: ignore[no-untyped-call]
        self._tapped = dict.fromkeys(layers, torch.empty(0))
        self._hooks = [body.layers[layer].register_forward_hook(partial(self._keep, layer)) for layer in self._tapped]

    def _keep(self, layer: int, _module: Any, _inputs: Any, output: Any) -> None:
        self._tapped[layer] = (output[0] if isinstance(output, tuple) else output)[0]

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`."""
        return self._compute(pack(spans, self.block_size))

    def _compute(self, batch: PackedSpans) -> torch.Tensor:
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
            input_ids=token_ids.long().unsqueeze(0),
            position_ids=positions.long().unsqueeze(0),
            use_cache=False,
            logits_to_keep=wanted.long(),
            paged=paged,
        )
        self._gather_features()
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _gather_features(self) -> None:
        if self._tapped:
            self.features = torch.cat(list(self._tapped.values()), -1)

    def copy_block(self, source: int, target: int) -> None:
        """See `PagedModel.copy_block`."""
        for side in (*self.cache.keys, *self.cache.values):
            side[target] = side[source]

    def kv_parts(self) -> list[torch.Tensor]:
        """See `PagedModel.kv_parts`."""
        return [*self.cache.keys, *self.cache.values]

    def prepare(self) -> None:
        """Called once, when the model is known to be right."""

    def pick(self, logits: torch.Tensor, temperatures: Sequence[float], keys: np.ndarray) -> torch.Tensor:
        """See `PagedModel.pick`."""
        return pick(logits, temperatures, keys)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
