"""Triton's interpreter, which runs CUDA kernels where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import triton

_version = tuple(int(part) for part in triton.__version__.split(".")[:2])
needs_interpreter = pytest.mark.skipif(
    _version < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of older Tritons stumbles over numpy 2.4; on a GPU tests/gpu has the same tests",
)
