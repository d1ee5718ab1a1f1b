"""Products of 8-bit integers: weights with a scale for each column, activations with one for each token.

Weights are quantized when they are loaded (to the nearest, symmetrically), activations on the way, from what they are there:
no calibration. Sums are exact 32-bit integers, so results do not depend on the batch here either. The instruction
(AVX512-VNNI) takes one side unsigned, so weights are stored 128 higher, and 128 times a token's sum is taken off again.

See Dettmers et al., LLM.int8() (2022), for vector-wise quantization.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import overload

from tailserve.engine.model.avx512 import TALLEST, product
from tailserve.engine.model.kernels import gated, linear, put
from tailserve.engine.model.microkernel import LANES
from tailserve.engine.model.team import later, meet, place_of, take, take_next, tasks_of
from tailserve.engine.model.tiles import COLUMNS
from tailserve.engine.model.vectors import (
    exp,
    hold,
    larger,
    magnitude,
    nearest,
    peak,
    read,
    read_bfloat16,
    read_integers,
    spread,
    total,
    write,
    write_int8,
)

PAIR = 4
"""Consecutive numbers of a column that lie side by side in a panel."""
LINES = 16
"""Cache lines of a panel under 32 columns of activations."""
ZERO = 128
"""What a weight of 0 is stored as."""
_HIGHEST = np.float32(127.0)

_multiply = product("vpdpbusd", 2, COLUMNS // PAIR)


class Panels(NamedTuple):
    """Weights of one product in all layers."""

    data: npt.NDArray[np.generic]
    """[layers, P, steps, 32 * pair]: bfloat16 bits, float32, or uint8."""
    scales: npt.NDArray[np.float32]
    """[layers, 32 P]; [layers, 0] where weights are not quantized."""


class Quantized(NamedTuple):
    """Memory for the activations of a step as integers."""

    values: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    """[T]"""
    sums: npt.NDArray[np.int64]
    """[T]: of a token's integers."""


def project(x, narrow, panels, layer, out, strip_stride, row_stride, add, team):
    """`kernels.linear`, by way of integers where the weights are. Counts as two kernels."""
    raise NotImplementedError


@overload(project)
def _project(x, narrow, panels, layer, out, strip_stride, row_stride, add, team):  # pragma: no cover
    if panels.types[0].dtype == types.uint8:

        def integers(x, narrow, panels, layer, out, strip_stride, row_stride, add, team):
            _quantize_all(x, narrow, team)
            _linear(x.shape, narrow, panels, layer, out, strip_stride, row_stride, add, later(team, 1))

        return integers

    def floats(x, narrow, panels, layer, out, strip_stride, row_stride, add, team):
        linear(x, panels.data, layer, out, strip_stride, row_stride, add, team)

    return floats


def project_gated(x, narrow, panels, layer, out, team):
    """`kernels.gated`, likewise."""
    raise NotImplementedError


@overload(project_gated)
def _project_gated(x, narrow, panels, layer, out, team):  # pragma: no cover
    if panels.types[0].dtype == types.uint8:

        def integers(x, narrow, panels, layer, out, team):
            _quantize_all(x, narrow, team)
            _gated(x.shape, narrow, panels, layer, out, later(team, 1))

        return integers

    return lambda x, narrow, panels, layer, out, team: gated(x, panels.data, layer, out, team)


@njit(cache=True, nogil=True, inline="always")
def _strip_stride(tokens):  # pragma: no cover
    """Bytes between strips [tokens, 32] of integers; an odd number of rows, as `layer.strips_of` has it."""
    return (tokens | 1) * COLUMNS


def _read_any(like, address):
    raise NotImplementedError


@overload(_read_any, inline="always")
def _read_any_overload(like, address):  # pragma: no cover
    if like.dtype == types.uint16:
        return lambda like, address: read_bfloat16(address)
    return lambda like, address: read(address)


@njit(cache=True, nogil=True)
def _quantize_all(x, narrow, team):  # pragma: no cover
    """x [K / 32, T, 32] as integers in `narrow`, each token by its own largest."""
    strips, tokens, size = x.shape[0], x.shape[1], x.itemsize
    source, stride = x.ctypes.data, x.strides[0]
    target, target_stride = narrow.values.ctypes.data, _strip_stride(tokens)
    scales, sums = narrow.scales, narrow.sums
    t = take(team, tokens)
    while t < tokens:
        here, there = source + t * COLUMNS * size, target + t * COLUMNS
        lead = spread(np.float32(0.0))
        for s in range(strips):
            lead = larger(lead, magnitude(_read_any(x, here + s * stride)))
            lead = larger(lead, magnitude(_read_any(x, here + s * stride + LANES * size)))
        largest = peak(lead)
        factor = spread(_HIGHEST / largest if largest > 0 else np.float32(0.0))
        sum_ = spread(np.float32(0.0))
        for s in range(strips):
            for half in range(0, COLUMNS, LANES):
                value = nearest(_read_any(x, here + s * stride + half * size) * factor)
                sum_ = sum_ + value
                write_int8(there + s * target_stride + half, value)
        scales[t] = largest / _HIGHEST
        sums[t] = np.int64(total(sum_))
        t = take_next(team, tokens, t)
    meet(team, tokens)


@njit(cache=True, nogil=True)
def _product(
    narrow, begin, rows, stride, panel, steps, sums, out, out_stride, scales, add, ahead, lines
):  # pragma: no cover
    """Rows begin : begin + rows of the activations times a panel, scaled, to float32 rows at `out`. `sums`: scratch."""
    x = narrow.values.ctypes.data + begin * COLUMNS
    strips = steps // (COLUMNS // PAIR)
    _multiply(rows, x, COLUMNS, stride, panel, sums, 4 * COLUMNS, strips, 0, ahead, lines)
    for r in range(rows):
        scale, high = spread(narrow.scales[begin + r]), ZERO * narrow.sums[begin + r]
        for half in range(0, 4 * COLUMNS, 4 * LANES):
            value = read_integers(sums + r * 4 * COLUMNS + half, high) * scale * read(scales + half)
            place = out + r * out_stride + half
            write(place, read(place) + value if add else value)


@njit(cache=True, nogil=True)
def _linear(shape, narrow, panels, layer, out, strip_stride, row_stride, add, team):  # pragma: no cover
    tokens, count, steps = shape[1], panels.data.shape[1], panels.data.shape[2]
    stride = panels.data.strides[1]
    base, scales = panels.data.ctypes.data + layer * panels.data.strides[0], panels.scales[layer:].ctypes.data
    x_stride = _strip_stride(tokens)
    tasks = tasks_of(count, team)
    sums = np.empty(TALLEST * COLUMNS, np.int32)
    task = take(team, tasks)
    while task < tasks:
        panel, first, end = place_of(task, count, tokens, team)
        here, lines = base + panel * stride, LINES
        for begin in range(first, end, TALLEST):
            _product(
                narrow, begin, min(TALLEST, end - begin), x_stride, here, steps, sums.ctypes.data,
                out + panel * strip_stride + begin * row_stride, row_stride, scales + panel * 4 * COLUMNS, add,
                here + stride, lines,
            )  # fmt: skip
            lines = 0
        task = take_next(team, tasks, task)
    hold(sums)
    meet(team, tasks)


@njit(cache=True, nogil=True)
def _gated(shape, narrow, panels, layer, out, team):  # pragma: no cover
    tokens, count, steps = shape[1], panels.data.shape[1] // 2, panels.data.shape[2]
    stride = panels.data.strides[1]
    base, scales = panels.data.ctypes.data + layer * panels.data.strides[0], panels.scales[layer:].ctypes.data
    x_stride = _strip_stride(tokens)
    target, size, strip = out.ctypes.data, out.itemsize, out.strides[0]
    one, zeros = spread(np.float32(1.0)), spread(np.float32(0.0))
    tasks = tasks_of(count, team)
    sums = np.empty(TALLEST * COLUMNS, np.int32)
    gate, up = np.empty(TALLEST * COLUMNS, np.float32), np.empty(TALLEST * COLUMNS, np.float32)
    task = take(team, tasks)
    while task < tasks:
        panel, first, end = place_of(task, count, tokens, team)
        lines = LINES
        for begin in range(first, end, TALLEST):
            rows = min(TALLEST, end - begin)
            for which in range(2):
                here = base + (2 * panel + which) * stride
                _product(
                    narrow, begin, rows, x_stride, here, steps, sums.ctypes.data,
                    (up if which else gate).ctypes.data, 4 * COLUMNS, scales + (2 * panel + which) * 4 * COLUMNS, 0,
                    here + 2 * stride, lines,
                )  # fmt: skip
            lines = 0
            place = target + panel * strip + begin * COLUMNS * size
            for i in range(0, rows * COLUMNS, LANES):
                g = read(gate.ctypes.data + i * 4)
                put(out, place + i * size, g / (one + exp(zeros - g)) * read(up.ctypes.data + i * 4))
        task = take_next(team, tasks, task)
    hold(sums)
    hold(gate)
    hold(up)
    meet(team, tasks)
