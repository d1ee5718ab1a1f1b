"""A few rows of activations times packed panels, by the best this CPU has: AMX, AVX-512, AVX2, or plain vectors.

Which instructions run depends on the CPU and the type alone, never on the number of rows, so a row's bits do not depend on
its neighbours.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from tailserve.engine.model.amx import HAS_AMX, TILE, configuration, configure, dot, load, release, save, zero
from tailserve.engine.model.microkernel import LANES, STRIP, heights, product
from tailserve.engine.model.team import prefetch

COLUMNS = STRIP
"""Columns of a panel of weights, and of a strip of activations [K / 32, T, 32]."""

PAGE = LANES
"""Tokens of a page of keys or values."""

AHEAD = 4
"""Pages between the one that is read and the one that is asked for: they lie anywhere, so the CPU cannot foresee them."""

MAX_ROWS = 2 * TILE if HAS_AMX else heights("bfloat16")[0]
"""Rows that one pass over a panel serves best; any number is right."""

_HEIGHTS_FLOAT32, _HEIGHTS_BFLOAT16 = heights("float32"), heights("bfloat16")
_multiply_float32, _multiply_bfloat16 = product("float32", 2, STRIP), product("bfloat16", 2, STRIP // 2)
_score_float32, _score_bfloat16 = product("float32", 1, STRIP), product("bfloat16", 1, STRIP // 2)
_weigh_float32, _weigh_bfloat16 = product("float32", 2, PAGE), product("bfloat16", 2, PAGE // 2)


def _configurations(depth: int) -> np.ndarray:
    """[rows of x]: two by two sums, two tiles of x, and two of a panel of `depth` * 2 rows of weights."""
    tables = [np.zeros(64, np.uint8)]
    for rows in range(1, 2 * TILE + 1):
        upper, lower = min(rows, TILE), max(rows - TILE, 1)
        x = [(upper, 4 * depth), (lower, 4 * depth)]
        tables.append(configuration([(upper, 64)] * 2 + [(lower, 64)] * 2 + x + [(depth, 64)] * 2))
    return np.stack(tables)


_CONFIGURATIONS, _PAGE_CONFIGURATIONS = _configurations(TILE), _configurations(PAGE // 2)


def multiply(x, begin, rows, panel, steps, out, out_stride, add, ahead, lines):
    """Rows begin : begin + rows of x [K / 32, T, 32] times the panel [steps, 32 * pair] at an address.

    The float32 rows at the address `out` are set to the product, or if `add` is not 0 raised by it. Meanwhile memory from
    the address `ahead` on is asked for, so many cache lines for each 32 columns of x.
    """
    raise NotImplementedError


@overload(multiply)
def _multiply(x, begin, rows, panel, steps, out, out_stride, add, ahead, lines):  # pragma: no cover
    if x.dtype == types.uint16 and HAS_AMX:

        def tiles(x, begin, rows, panel, steps, out, out_stride, add, ahead, lines):
            address = x.ctypes.data + begin * COLUMNS * 2
            _multiply_tiles(rows, address, x.strides[0], panel, steps, out, out_stride, add, ahead, lines)

        return tiles

    narrow = x.dtype == types.uint16
    kernel = _multiply_bfloat16 if narrow else _multiply_float32
    heights = _HEIGHTS_BFLOAT16 if narrow else _HEIGHTS_FLOAT32
    strip = STRIP // 2 if narrow else STRIP

    def vectors(x, begin, rows, panel, steps, out, out_stride, add, ahead, lines):
        stride = x.strides[1]
        address = x.ctypes.data + begin * stride
        for height in heights:
            while rows >= height:
                kernel(height, address, stride, x.strides[0], panel, out, out_stride, steps // strip, add, ahead, lines)
                lines = 0
                rows -= height
                address += height * stride
                out += height * out_stride

    return vectors


@njit(cache=True, nogil=True)
def _multiply_tiles(rows, x, strip_stride, panel, steps, out, out_stride, add, ahead, lines):  # pragma: no cover
    configure(_CONFIGURATIONS.ctypes.data + rows * 64)
    lower, lower_out = rows > TILE, out + TILE * out_stride
    if add:
        load(0, out, out_stride)
        load(1, out + 64, out_stride)
        if lower:
            load(2, lower_out, out_stride)
            load(3, lower_out + 64, out_stride)
    else:
        zero(0)
        zero(1)
        if lower:
            zero(2)
            zero(3)
    for _ in range(0, steps, TILE):
        for line in range(lines):
            prefetch(ahead + line * 64)
        load(6, panel, 128)
        load(4, x, 64)
        dot(0, 4, 6)
        load(7, panel + 64, 128)
        dot(1, 4, 7)
        if lower:
            load(5, x + TILE * 64, 64)
            dot(2, 5, 6)
            dot(3, 5, 7)
        x += strip_stride
        panel += TILE * 128
        ahead += lines * 64
    _save(rows, out, out_stride)
    release()


def score(query, rows, x, x_stride, pages, count, steps, out, out_stride):
    """Queries times pages of keys, each [steps, 16 * pair] at one of the first `count` addresses of `pages`.

    Writes float32 [rows, 16 * count]. `query` gives the type; x is the address of the rows. Pages behind the first `count`
    are those that are needed next, and are asked for.
    """
    raise NotImplementedError


@overload(score)
def _score(query, rows, x, x_stride, pages, count, steps, out, out_stride):  # pragma: no cover
    if query.dtype == types.uint16 and HAS_AMX:

        def tiles(query, rows, x, x_stride, pages, count, steps, out, out_stride):
            for top in range(0, rows, MAX_ROWS):
                some = min(MAX_ROWS, rows - top)
                _score_tiles(some, x + top * x_stride, x_stride, pages, count, steps, out + top * out_stride, out_stride)

        return tiles

    narrow = query.dtype == types.uint16
    kernel = _score_bfloat16 if narrow else _score_float32
    heights = _HEIGHTS_BFLOAT16 if narrow else _HEIGHTS_FLOAT32
    strip = STRIP // 2 if narrow else STRIP

    def vectors(query, rows, x, x_stride, pages, count, steps, out, out_stride):
        for height in heights:
            while rows >= height:
                for p in range(count):
                    ahead = pages[min(p + AHEAD, len(pages) - 1)]
                    target = out + p * PAGE * 4
                    kernel(height, x, x_stride, strip * 4, pages[p], target, out_stride, steps // strip, 0, ahead, strip)
                rows -= height
                x += height * x_stride
                out += height * out_stride

    return vectors


@njit(cache=True, nogil=True)
def _score_tiles(rows, x, x_stride, pages, count, steps, out, out_stride):  # pragma: no cover
    configure(_CONFIGURATIONS.ctypes.data + rows * 64)
    lower, lower_out = rows > TILE, out + TILE * out_stride
    for p in range(count):
        zero(0)
        if lower:
            zero(2)
        for step in range(0, steps, TILE):
            load(6, pages[p] + step * 64, 64)
            load(4, x + step * 4, x_stride)
            dot(0, 4, 6)
            if lower:
                load(5, x + TILE * x_stride + step * 4, x_stride)
                dot(2, 5, 6)
        save(0, out + p * PAGE * 4, out_stride)
        if lower:
            save(2, lower_out + p * PAGE * 4, out_stride)
    release()


def weigh(query, rows, weights, stride, pages, begin, parts, out, out_stride):
    """Weights times pages of values, each [parts, 16 / pair, 32 * pair] at the addresses of `pages` from number `begin` on.

    `query` gives the type; `weights` is the address of rows of 16 numbers for each page, out that of float32
    [rows, 32 * parts], which must be 0.
    """
    raise NotImplementedError


@overload(weigh)
def _weigh(query, rows, weights, stride, pages, begin, parts, out, out_stride):  # pragma: no cover
    if query.dtype == types.uint16 and HAS_AMX:

        def tiles(query, rows, weights, stride, pages, begin, parts, out, out_stride):
            for top in range(0, rows, MAX_ROWS):
                some, source, target = min(MAX_ROWS, rows - top), weights + top * stride, out + top * out_stride
                for part in range(parts):
                    offset = part * PAGE * COLUMNS * 2
                    _weigh_tiles(some, source, stride, pages, begin, offset, target + part * COLUMNS * 4, out_stride)

        return tiles

    narrow = query.dtype == types.uint16
    kernel = _weigh_bfloat16 if narrow else _weigh_float32
    heights = _HEIGHTS_BFLOAT16 if narrow else _HEIGHTS_FLOAT32
    size = 2 if narrow else 4
    lines = PAGE * COLUMNS * size // 64

    def vectors(query, rows, weights, stride, pages, begin, parts, out, out_stride):
        for height in heights:
            while rows >= height:
                for p in range(len(pages) - begin):
                    page, ahead = pages[begin + p], pages[min(begin + p + AHEAD, len(pages) - 1)]
                    for part in range(parts):
                        offset, source = part * PAGE * COLUMNS * size, weights + p * PAGE * size
                        target = out + part * COLUMNS * 4
                        kernel(height, source, stride, 0, page + offset, target, out_stride, 1, 1, ahead + offset, lines)
                rows -= height
                weights += height * stride
                out += height * out_stride

    return vectors


@njit(cache=True, nogil=True)
def _weigh_tiles(rows, weights, stride, pages, begin, offset, out, out_stride):  # pragma: no cover
    configure(_PAGE_CONFIGURATIONS.ctypes.data + rows * 64)
    lower = rows > TILE
    zero(0)
    zero(1)
    if lower:
        zero(2)
        zero(3)
    for p in range(len(pages) - begin):
        panel, x = pages[begin + p] + offset, weights + p * PAGE * 2
        load(6, panel, 128)
        load(4, x, stride)
        dot(0, 4, 6)
        load(7, panel + 64, 128)
        dot(1, 4, 7)
        if lower:
            load(5, x + TILE * stride, stride)
            dot(2, 5, 6)
            dot(3, 5, 7)
    _save(rows, out, out_stride)
    release()


@njit(cache=True, nogil=True)
def _save(rows, out, out_stride):  # pragma: no cover
    save(0, out, out_stride)
    save(1, out + 64, out_stride)
    if rows > TILE:
        save(2, out + TILE * out_stride, out_stride)
        save(3, out + TILE * out_stride + 64, out_stride)
