"""Memory that compiled kernels address by numbers stays theirs while they use it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY, save_model
from transformers import LlamaConfig

PROGRAM = """
import sys
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

model, _ = load_model(LoadOptions(path=sys.argv[1], dtype="float32", attention_backend="compiled", num_blocks=8))
print(model.forward([Span(list(range(5, 45)), 0, range(4), 2)]).numpy().tobytes().hex())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="overwriting what is freed is the C library's")
def test_no_kernel_uses_what_it_has_freed(tmp_path: Path) -> None:
    path = save_model(LlamaConfig(**(TINY | {"hidden_size": 128})), tmp_path)
    outputs = []
    for tunables in ("", "glibc.malloc.perturb=85"):
        environment = os.environ | {"GLIBC_TUNABLES": tunables}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, path], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
