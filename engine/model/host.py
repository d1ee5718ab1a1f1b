"""KV blocks in host memory: the verifier's side of the second tier."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import numpy as np
import torch

from tailserve.engine.model.memory import Reserve, untouched_zeros
from tailserve.engine.types import BlockMove

AT_ONCE = 64
"""Blocks whose content is on the device twice, at most, while they are copied."""


class HostBlocks(Protocol):
    """Blocks in host memory, each with all parts of a block of the device in a row."""

    def make(self, moves: Sequence[BlockMove]) -> None:
        """Makes moves, as if one after the other. What is computed from now on sees them."""


def host_blocks(parts: Sequence[torch.Tensor], num_blocks: int) -> HostBlocks:
    """`parts`: of each layer keys and values, [blocks, ...] of as many bytes a block each."""
    # As bytes: not every type can be indexed.
    flat = [part.flatten(1).view(torch.uint8) for part in parts]
    return PinnedBlocks(flat, num_blocks) if flat[0].is_cuda else MemoryBlocks(flat, num_blocks)


class MemoryBlocks:
    """Where the device's blocks are in the same memory."""

    def __init__(self, parts: Sequence[torch.Tensor], num_blocks: int) -> None:
        self._parts = [part.numpy() for part in parts]
        self._blocks = untouched_zeros((num_blocks, len(parts), parts[0].shape[1]), np.uint8)
        self._reserve = Reserve([self._blocks[np.newaxis]])

    def make(self, moves: Sequence[BlockMove]) -> None:
        """See `HostBlocks.make`. A piece after the other is faster than to gather them."""
        if moves:
            self._reserve.note_use(np.array([move.host_block for move in moves]))
        for move in moves:
            pieces = zip(self._parts, self._blocks[move.host_block], strict=True)
            if move.to_host:
                for part, piece in pieces:
                    piece[:] = part[move.block]
            else:
                for part, piece in pieces:
                    part[move.block] = piece


class PinnedBlocks:
    """Beside a CUDA device. Copies have a stream of their own, in their order: what is computed waits for what is loaded,
    not for what is saved, unless something is loaded behind it."""

    def __init__(self, parts: Sequence[torch.Tensor], num_blocks: int) -> None:
        self._parts = parts
        self._device = parts[0].device
        self._blocks = torch.from_numpy(untouched_zeros((num_blocks, len(parts), parts[0].shape[1]), np.uint8))
        # Not `pin_memory`, which takes the next power of two of bytes.
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(self._blocks.data_ptr(), self._blocks.nbytes, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, self._blocks.data_ptr())
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def make(self, moves: Sequence[BlockMove]) -> None:
        """See `HostBlocks.make`."""
        for to_host, some in groupby(moves, key=lambda move: move.to_host):
            run = list(some)
            for begin in range(0, len(run), AT_ONCE):
                part = run[begin : begin + AT_ONCE]
                # Of two moves to one place the later counts.
                if to_host:
                    self._save({move.host_block: move.block for move in part})
                else:
                    self._load({move.block: move.host_block for move in part})

    def _save(self, sources: dict[int, int]) -> None:
        blocks = torch.tensor(list(sources.values()), device=self._device)
        found = torch.stack([part[blocks] for part in self._parts], 1)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for host_block, content in zip(sources, found, strict=True):
                self._blocks[host_block].copy_(content, non_blocking=True)
        found.record_stream(self._stream)

    def _load(self, sources: dict[int, int]) -> None:
        # Before anything is waited for: to send these waits for the device.
        blocks = torch.tensor(list(sources), device=self._device)
        current = torch.cuda.current_stream(self._device)
        found = torch.empty((len(sources), *self._blocks.shape[1:]), dtype=torch.uint8, device=self._device)
        # Its memory may have been in use until now.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for content, host_block in zip(found, sources.values(), strict=True):
                content.copy_(self._blocks[host_block], non_blocking=True)
        current.wait_stream(self._stream)
        for number, part in enumerate(self._parts):
            part[blocks] = found[:, number]
