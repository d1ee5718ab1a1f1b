"""Products by way of 8-bit integers."""

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from tailserve.engine.model.avx512 import HAS_INT8_DOT
from tailserve.engine.model.decoder_weights import integer_panels
from tailserve.engine.model.int8 import Panels, Quantized, project
from tailserve.engine.model.layer import strips_of
from tailserve.engine.model.memory import aligned

pytestmark = pytest.mark.skipif(not HAS_INT8_DOT, reason="needs AVX512-VNNI")
DEPTH, COLUMNS = 96, 70


@njit
def run(x, narrow, panels, out, add, lines):  # type: ignore[no-untyped-def]
    strip, row = out.strides[0], out.strides[1]
    project(x, narrow, panels, 0, out.ctypes.data, strip, row, add, (0, 2, False, lines.ctypes.data))


def product(x: np.ndarray, panels: Panels, start: float | None = None) -> np.ndarray:
    """x [T, DEPTH], float32, times the panels; added to `start` if there is one."""
    tokens = len(x)
    rows = tokens | 1
    strips = strips_of(aligned((rows * DEPTH,), np.float32), DEPTH, tokens)
    strips[...] = x.reshape(tokens, -1, 32).transpose(1, 0, 2)
    narrow = Quantized(aligned((rows * DEPTH,), np.int8), np.empty(rows, np.float32), np.empty(rows, np.int64))
    out = strips_of(aligned((rows * 96,), np.float32), 96, tokens)
    out[...] = start or 0.0
    run(strips, narrow, panels, out, int(start is not None), np.zeros(32, np.int64))
    result: np.ndarray = out.transpose(1, 0, 2).reshape(tokens, -1)[:, :COLUMNS]
    return result


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return (
        torch.randn(COLUMNS, DEPTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, COLUMNS)[:, None]
    )


def test_equals_integer_arithmetic(weight: torch.Tensor) -> None:
    x = np.random.default_rng(0).normal(0, 1, (30, DEPTH)).astype(np.float32)
    x[3] = 0.0
    x[4] *= 1000.0
    x_scale = np.abs(x).max(1, keepdims=True) / 127
    w_scale = weight.abs().amax(1).numpy() / 127
    x_integers = np.rint(np.divide(x, x_scale, where=x_scale > 0, out=np.zeros_like(x))).astype(np.int64)
    w_integers = np.rint(weight.numpy() / w_scale[:, None]).astype(np.int64)
    exact = x_integers @ w_integers.T * x_scale * w_scale
    np.testing.assert_allclose(product(x, integer_panels([weight])), exact, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(product(x, integer_panels([weight]), 5.0), exact + 5, rtol=2e-3, atol=1e-5)


def test_bits_do_not_depend_on_the_batch(weight: torch.Tensor) -> None:
    x: Any = np.random.default_rng(1).normal(0, 1, (30, DEPTH)).astype(np.float32)
    panels = integer_panels([weight])
    together = product(x, panels)
    assert (np.concatenate([product(x[n : n + 1], panels) for n in range(30)]) == together).all()
