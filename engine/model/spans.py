"""Stretches of sequences side by side: one batch, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Span:
    """A stretch of one sequence to compute."""

    token_ids: Sequence[int]
    start: int
    """Position of the first token; everything before it is in the cache."""
    block_ids: Sequence[int]
    """An `array` is read fastest."""
    num_logits: int
    """Logits are wanted for this many tokens at the end."""


@dataclass(frozen=True)
class PackedSpans:
    """S spans of T tokens together. Integers, on the host."""

    token_ids: Array
    """[T]"""
    positions: Array
    """[T]: each token's place in its own sequence."""
    query_starts: Array
    """[S + 1]: span s has the tokens query_starts[s] : query_starts[s + 1]."""
    starts: Array
    """[S]: position of each span's first token."""
    context_lens: Array
    """[S]: tokens of each sequence up to and with its last in the batch."""
    block_tables: Array
    """[S, M]: block ids in order, padded with 0."""
    slots: Array
    """[T]: where each token's keys and values go, as block * block_size + offset."""
    wanted: Array
    """Indices of the tokens whose logits are wanted, span after span."""


def query_tiles(query_starts: Array, starts: Array, width: int) -> Array:
    """Query tokens in tiles of at most `width`: [N, 4] of sequence, first token in the batch, tokens, position of that."""
    lengths = np.diff(query_starts)
    counts = -(-lengths // width)
    owner = np.repeat(np.arange(len(lengths)), counts)
    offsets = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * width
    sizes = np.minimum(width, lengths[owner] - offsets)
    return np.stack([owner, query_starts[owner] + offsets, sizes, starts[owner] + offsets], axis=1).astype(np.int64)


def wanted_tiles(batch: PackedSpans, counts: Array, width: int) -> tuple[Array, Array]:
    """The tiles of the tokens `batch.wanted`, the last `counts` [S] of each span, and where among these each begins."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    tiles = query_tiles(starts, batch.context_lens - counts, width)
    rows = tiles[:, 1].copy()
    tiles[:, 1] = batch.wanted[rows]
    return tiles, rows


def pack(spans: Sequence[Span], block_size: int) -> PackedSpans:
    """Lays spans side by side."""
    lengths = np.array([len(span.token_ids) for span in spans], np.int32)
    counts = np.array([span.num_logits for span in spans], np.int32)
    starts = np.array([span.start for span in spans], np.int32)
    query_starts = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    tables = np.zeros((len(spans), max(len(span.block_ids) for span in spans)), np.int32)
    for index, span in enumerate(spans):
        tables[index, : len(span.block_ids)] = span.block_ids
    owner = np.repeat(np.arange(len(spans)), lengths)
    positions = np.arange(len(owner)) - query_starts[owner] + starts[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    before = np.cumsum(counts) - counts
    return PackedSpans(
        token_ids=np.fromiter(chain.from_iterable(span.token_ids for span in spans), np.int64, len(owner)),
        positions=positions.astype(np.int64),
        query_starts=query_starts,
        starts=starts,
        context_lens=starts + lengths,
        block_tables=tables,
        slots=slots,
        wanted=np.repeat(query_starts[1:] - counts - before, counts) + np.arange(counts.sum()),
    )
