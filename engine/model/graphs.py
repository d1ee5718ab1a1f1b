"""Steps as CUDA graphs: one launch for a whole forward, for any mix of sequences up to a number of tokens."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from tailserve.engine.model.attention import PackedSequences, PagedContext
from tailserve.engine.model.cuda import tile_width
from tailserve.engine.model.paged import TransformersModel
from tailserve.engine.model.spans import PackedSpans, Span, pack, query_tiles

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of a graph. A batch runs in the smallest that takes it; larger ones are launched kernel by kernel."""


class _Captured(NamedTuple):
    """A graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    logits: torch.Tensor
    features: torch.Tensor | None


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
        inputs = torch.zeros(self._layout(size)[-1], dtype=torch.int32, device=self._device)
        inputs.copy_(self._fill(size, pack([Span([0], 0, [self.num_blocks], 1)], self.block_size)))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(size, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run(size, inputs)
        return _Captured(graph, inputs, logits, self.features)

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
        captured.inputs.copy_(self._fill(size, batch), non_blocking=True)
        captured.graph.replay()
        self.features = None if captured.features is None else captured.features[:count]
        return captured.logits[:wanted]

    def _layout(self, size: int) -> tuple[int, ...]:
        """Where parts of the input begin: tokens, positions, slots, wanted, tiles, tables; and its length."""
        lengths = (size, size, size, size, 4 * size, size * self._max_blocks)
        return tuple(np.cumsum((0, *lengths)).tolist())

    def _fill(self, size: int, batch: PackedSpans) -> torch.Tensor:
        """All inputs of a step in one piece of memory, filled up to `size` tokens, sequences and tiles."""
        begins = self._layout(size)
        out = np.zeros(begins[-1], np.int32)
        out[begins[2] : begins[3]] = self.num_blocks * self.block_size
        tiles = query_tiles(batch.query_starts, batch.starts, self._tile_width)
        width = min(batch.block_tables.shape[1], self._max_blocks)
        tables = np.zeros((len(batch.block_tables), self._max_blocks), np.int32)
        tables[:, :width] = batch.block_tables[:, :width]
        parts = (batch.token_ids, batch.positions, batch.slots, batch.wanted, tiles.ravel(), tables.ravel())
        for begin, part in zip(begins, parts, strict=False):
            out[begin : begin + len(part)] = part
        host = torch.from_numpy(out)
        return host.pin_memory() if self._device.type == "cuda" else host

    def _run(self, size: int, inputs: torch.Tensor) -> torch.Tensor:
        begins = self._layout(size)
        tokens, positions, slots, wanted, tiles, tables = (inputs[begin:end] for begin, end in pairwise(begins))
        empty = np.empty(0, np.int32)
        sequences = PackedSequences(empty, empty, empty, slots.long())
        sequences.place(tables.view(size, self._max_blocks), tiles.view(size, 4))
        return self._logits(
            tokens.long(), positions.long(), wanted.long(), PagedContext(self.cache, self._backend, sequences)
        )
