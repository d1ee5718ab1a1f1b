"""Steps as CUDA graphs: one launch for a whole forward, for any mix of sequences up to a number of tokens."""

from __future__ import annotations

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
from tailserve.engine.speculation.sampling import noise_keys

logger = logging.getLogger(__name__)

FEW = 64
"""Logits of a batch that is mostly prompts, at most."""


class Size(NamedTuple):
    """What a graph takes."""

    tokens: int
    wanted: int
    """Tokens whose logits are computed."""


SIZES = sorted(
    [Size(count, count) for count in (1, 2, 4, 8, 16, 32, 48, FEW, 96, 128, 192, 256)]
    + [Size(count, FEW) for count in (96, 128, 192, 256, 384, LONG)]
)
"""A batch runs in the first that takes it; others are launched kernel by kernel."""


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
        self._max_model_len, self._max_blocks = max_model_len, -(-max_model_len // self.block_size)
        config = self._model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        self._tile_width = tile_width(heads, getattr(config, "num_key_value_heads", None) or heads)
        self._inputs = _Inputs(LONG * (8 + self._max_blocks), self._device)
        self._outputs = torch.empty(0)
        """Logits of all graphs, one at a time."""
        self._graphs: dict[Size, _Captured] = {}

    @torch.inference_mode()
    def prepare(self) -> None:
        """Captures all sizes. A model that cannot be captured is launched kernel by kernel, and a warning says so."""
        before = torch.cuda.current_stream()
        try:
            pool = torch.cuda.graph_pool_handle()
            for size in sorted(SIZES, key=lambda size: size.wanted, reverse=True):
                self._graphs[size] = self._capture(size, pool)
        except RuntimeError as error:
            self._graphs.clear()
            # A capture that fails does not always leave its own stream.
            torch.cuda.set_stream(before)
            logger.warning("this model cannot be captured as a CUDA graph, so its steps take longer: %s", error)
        # No request is to wait for kernels to be compiled that no graph holds.
        full = Span([0] * min(self.block_size, self._max_model_len), 0, [self.num_blocks], 1)
        self.forward([full] * (LONG // len(full.token_ids) + 1))
        self.pick(self.forward([full]), [1.0], noise_keys([0], [0]))

    def tap(self, layers: Sequence[int]) -> None:
        """See `PagedModel.tap`. Captures again what was captured."""
        super().tap(layers)
        if self._graphs:
            self._graphs.clear()
            self.prepare()

    def _capture(self, size: Size, pool: Any) -> _Captured:
        self._inputs.send(self._numbers(size, pack([Span([0], 0, [self.num_blocks], 1)], self.block_size)))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                logits = self._run(size)
            if len(self._outputs) < size.wanted:
                self._outputs = torch.empty_like(logits)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._outputs[: size.wanted].copy_(self._run(size))
        return _Captured(graph, self.features)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`. Logits and features are valid until the next call."""
        batch = pack(spans, self.block_size)
        count, wanted = len(batch.token_ids), len(batch.wanted)
        size = next((size for size in SIZES if size.tokens >= count and size.wanted >= wanted), None)
        if size is None or not self._graphs:
            return self._compute(batch)
        captured = self._graphs[size]
        self._inputs.send(self._numbers(size, batch))
        captured.graph.replay()
        self.features = None if captured.features is None else captured.features[:count]
        return self._outputs[:wanted]

    def pick(self, logits: torch.Tensor, temperatures: Sequence[float], keys: np.ndarray) -> torch.Tensor:
        """See `PagedModel.pick`."""
        return pick(logits, temperatures, keys)

    def _numbers(self, size: Size, batch: PackedSpans) -> np.ndarray:
        """What a graph reads: tokens, positions, slots, tiles [4], as many of each; wanted; tables."""
        tables = batch.block_tables[:, : self._max_blocks]
        width = tables.shape[1]
        tiles = query_tiles(batch.query_starts, batch.starts, self._tile_width) * (width, 1, 1, 1)
        filled = np.zeros((7, size.tokens), np.int32)
        filled[2] = self.num_blocks * self.block_size
        for row, part in zip(filled, (batch.token_ids, batch.positions, batch.slots), strict=False):
            row[: len(part)] = part
        filled[3:].reshape(-1)[: tiles.size] = tiles.ravel()
        wanted = np.zeros(size.wanted, np.int32)
        wanted[: len(batch.wanted)] = batch.wanted
        return np.concatenate([filled.ravel(), wanted, tables.ravel()])

    def _run(self, size: Size) -> torch.Tensor:
        inputs = self._inputs.on_device
        count, numbers = size.tokens, 7 * size.tokens
        tokens, positions, slots = inputs[: 3 * count].view(3, count)
        tiles, wanted = inputs[3 * count : numbers].view(count, 4), inputs[numbers : numbers + size.wanted]
        empty = np.empty(0, np.int32)
        sequences = PackedSequences(empty, empty, empty, slots)
        sequences.place(inputs[numbers + size.wanted :], tiles)
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
