"""Memory that compiled kernels address by numbers stays theirs while they use it."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY, save_model
from transformers import LlamaConfig

pytestmark = pytest.mark.cores

MODEL = Path(__file__).parents[2] / "engine" / "model"
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


def test_every_kernel_holds_the_arrays_that_it_addresses() -> None:
    """What is written to freed memory may be read there again, so the program above does not see all."""
    found = {}
    for path in MODEL.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                "njit" in ast.unparse(some) for some in function.decorator_list
            ):
                found[f"{path.name}: {function.name}"] = _addressed_and_held(function)
    assert sum(len(addressed) for addressed, _ in found.values()) >= 10
    for name, (addressed, held) in found.items():
        assert addressed == held, name


def _addressed_and_held(function: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """Names of arrays that a function makes and takes the address of, and of those that it holds behind that."""
    made: set[str] = set()
    addressed: dict[str, int] = {}
    held: dict[str, int] = {}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                made |= {ast.unparse(target) for target, value in zip(targets, values, strict=True) if _makes(value)}
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if _makes(value):
                made.add(target)
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id=array), attr="ctypes"), attr="data"):
                addressed[array] = max(addressed.get(array, 0), node.lineno)
            case ast.Call(func=ast.Name(id="hold"), args=[ast.Name(id=array)]):
                held[array] = node.lineno
    return made & addressed.keys(), {array for array, line in held.items() if line > addressed.get(array, 0)}


def _makes(value: ast.expr) -> bool:
    return ast.unparse(value).startswith(("np.empty(", "np.zeros("))
