"""Steps as CUDA graphs: one launch for a whole forward, for any mix of sequences up to a number of tokens."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tailserve.engine.model.attention import PackedSequences, PagedContext
from tailserve.engine.model.cuda import LONG, tile_width
from tailserve.engine.model.cuda_sampling import pick
from tailserve.engine.model.paged import TransformersModel
from tailserve.engine.model.spans import PackedSpans, Span, pack, query_tiles

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, LONG)
"""Tokens of a graph. A batch runs in the smallest that takes it; larger ones are launched kernel by kernel."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    features: torch.Tensor | None
    """Where it writes them."""


class GraphedModel(TransformersModel):
    """`TransformersModel` on CUDA. The cache has a block more than the scheduler knows: there go the keys of what fills a
    batch up.

    After "CUDA graphs" in PyTorch's documentation: inputs are copied to where they were when the graph was captured.
    """

    def __init__(self, *args: Any, max_model_len: int) -> None:
        super().__init__(*args)
        self.num_blocks = self.cache.num_blocks - 1
        self._max_blocks = -(-max_model_len // self.block_size)
        config = self._model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        self._tile_width = tile_width(heads, getattr(config, "num_key_value_heads", None) or heads)
        self._inputs = _Inputs(LONG * (8 + self._max_blocks), self._device)
        self._outputs = torch.empty(0)
        """Logits of all graphs, one at a time."""
        self._graphs: dict[int, _Captured] = {}

    @torch.inference_mode()
    def prepare(self) -> None:
        """Captures all sizes. A model that cannot be captured is launched kernel by kernel, and a warning says so."""
        before = torch.cuda.current_stream()
        try:
            pool = torch.cuda.graph_pool_handle()
            for size in reversed(SIZES):
                self._graphs[size] = self._capture(size, pool)
        except RuntimeError as error:
            self._graphs.clear()
            # A capture that fails does not always leave its own stream.
            torch.cuda.set_stream(before)
            logger.warning("this model cannot be captured as a CUDA graph, so its steps take longer: %s", error)

    def tap(self, layers: Sequence[int]) -> None:
        """See `PagedModel.tap`. Captures again what was captured."""
        super().tap(layers)
        if self._graphs:
            self._graphs.clear()
            self.prepare()

    def _capture(self, size: int, pool: Any) -> _Captured:
        self._inputs.send(self._numbers(size, pack([Span([0], 0, [self.num_blocks], 1)], self.block_size)))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                logits = self._run(size)
            if len(self._outputs) < size:
                self._outputs = torch.empty_like(logits)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._outputs[:size].copy_(self._run(size))
        return _Captured(graph, self.features)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`. Logits and features are valid until the next call."""
        batch = pack(spans, self.block_size)
        count, wanted = len(batch.token_ids), len(batch.wanted)
        place = bisect.bisect_left(SIZES, count)
        if place == len(SIZES) or not self._graphs:
            return super().forward(spans)
        size = SIZES[place]
        captured = self._graphs[size]
        self._inputs.send(self._numbers(size, batch))
        captured.graph.replay()
        self.features = None if captured.features is None else captured.features[:count]
        return self._outputs[:wanted]

    def pick(self, logits: torch.Tensor, temperatures: Sequence[float], keys: np.ndarray) -> torch.Tensor:
        """See `PagedModel.pick`."""
        return pick(logits, temperatures, keys)

    def _numbers(self, size: int, batch: PackedSpans) -> np.ndarray:
        """What a graph of `size` tokens reads: as many tokens, positions, slots, wanted and tiles; tables."""
        tables = batch.block_tables[:, : self._max_blocks]
        width = tables.shape[1]
        tiles = query_tiles(batch.query_starts, batch.starts, self._tile_width) * (width, 1, 1, 1)
        filled = np.zeros((8, size), np.int32)
        filled[2] = self.num_blocks * self.block_size
        for row, part in zip(filled, (batch.token_ids, batch.positions, batch.slots, batch.wanted), strict=False):
            row[: len(part)] = part
        filled[4:].reshape(-1)[: tiles.size] = tiles.ravel()
        return np.concatenate([filled.ravel(), tables.ravel()])

    def _run(self, size: int) -> torch.Tensor:
        inputs = self._inputs.on_device
        tokens, positions, slots, wanted = inputs[: 4 * size].view(4, size)
        tiles = inputs[4 * size : 8 * size].view(size, 4)
        empty = np.empty(0, np.int32)
        sequences = PackedSequences(empty, empty, empty, slots)
        sequences.place(inputs[8 * size :], tiles)
        return self._logits(tokens, positions, wanted, PagedContext(self.cache, self._backend, sequences))


class _Inputs:
    """Where graphs read: the one piece of memory of all of them, since one runs at a time."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.on_device = torch.zeros(length, dtype=torch.int32, device=device)
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, numbers: np.ndarray) -> None:
        """Replaces the first of them, in the order of what runs on the device."""
        if self._sent is not None:
            # What was sent last may still be under way.
            self._sent.synchronize()
        count = len(numbers)
        self._host.numpy()[:count] = numbers
        self.on_device[:count].copy_(self._host[:count], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
