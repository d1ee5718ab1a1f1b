"""`tailserve.engine.speculation.sampling.pick` for CUDA in Triton: noise is made where it is used."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

PART = 4096
"""Tokens that a program looks at."""


def pick(logits: torch.Tensor, temperatures: Sequence[float], keys: np.ndarray) -> torch.Tensor:
    """See `tailserve.engine.speculation.sampling.pick`."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    host = torch.from_numpy(np.column_stack([np.array(temperatures, np.float32).view(np.int32), keys]))
    # To send what is not pinned waits for the device.
    numbers = (host.pin_memory() if logits.is_cuda else host).to(logits.device, non_blocking=True)
    best = logits.new_empty((rows, parts))
    places = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _best_of_parts[(rows, parts)](logits, numbers, best, places, logits.stride(0), vocab, PART=PART)
    _best_of_all[(rows,)](best, places, tokens, parts, WIDTH=triton.next_power_of_2(parts))
    return tokens


@triton.jit
def _mix(bits):
    """lowbias32 (Wellons 2018)."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _log(x):
    """Natural logarithm of positive normal numbers (Cephes, logf). The device's own is not exact enough near 1, where
    the rarest noise comes from."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = mantissa < 0.70710678118654752
    e = tl.where(small, exponent - 1, exponent).to(tl.float32)
    m = tl.where(small, mantissa + mantissa, mantissa) - 1.0
    z = m * m
    p = 7.0376836292e-2
    p = p * m - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    y = p * m * z - 2.12194440e-4 * e - 0.5 * z
    return m + y + 0.693359375 * e


@triton.jit
def _best_of_parts(logits, numbers, best, places, stride, vocab, PART: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    columns = part * PART + tl.arange(0, PART)
    there = columns < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=there, other=-float("inf"))
    temperature = tl.load(numbers + row * 3).to(tl.float32, bitcast=True)
    if temperature > 0:
        bits = _mix(columns.to(tl.uint32) ^ tl.load(numbers + row * 3 + 1).to(tl.uint32, bitcast=True))
        bits = _mix(bits ^ tl.load(numbers + row * 3 + 2).to(tl.uint32, bitcast=True))
        uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        x = tl.div_rn(x, temperature) - _log(-_log(uniform))
    # What is no number is never picked, nor what is no token.
    x = tl.where(there & (x == x), x, -float("inf"))
    place = row * tl.num_programs(1) + part
    tl.store(best + place, tl.max(x, 0))
    tl.store(places + place, part * PART + tl.argmax(x, 0))


@triton.jit
def _best_of_all(best, places, tokens, parts, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    x = tl.load(best + row * parts + columns, mask=columns < parts, other=-float("inf"))
    tl.store(tokens + row, tl.load(places + row * parts + tl.argmax(x, 0)).to(tl.int64))
