"""What the house rules say about the code itself."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("engine", "deployments", "cluster") for path in (ROOT / folder).rglob("*.py")]
MAX_LINES = 300

# What importing a module must not bring in. Measured in a fresh interpreter.
FORBIDDEN = {
    "tailserve.engine.engine": {"ray", "torch", "transformers"},
    "tailserve.engine.sessions": {"ray", "torch", "transformers"},
    "tailserve.engine.options": {"ray", "torch", "transformers"},
    "tailserve.engine.speculation.ngram": {"ray", "torch", "transformers"},
    "tailserve.engine.model.loading": {"ray"},
    "tailserve.engine.model.runner": {"ray"},
    "tailserve.engine.model.draft": {"ray"},
    "tailserve.deployments.ingress": {"torch", "transformers"},
    "tailserve.deployments.router": {"torch", "transformers"},
    "tailserve.deployments.http": {"ray", "torch", "transformers"},
    "tailserve.deployments.cli": {"ray", "torch", "transformers"},
}
ALLOWED_IMPORTS = {
    "engine": {"engine"},
    "cluster": {"cluster", "engine"},
    "deployments": {"cluster", "deployments", "engine"},
}


def test_every_file_is_one_idea() -> None:
    long = {str(path): count for path in SOURCES if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, "files over 300 lines are a design question"


def test_the_engines_own_files_import_no_torch() -> None:
    for path in (ROOT / "engine").glob("*.py"):
        assert "import torch" not in path.read_text(), path


def test_imports_go_one_way() -> None:
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and words[1].startswith("tailserve."):
                assert words[1].split(".")[1] in ALLOWED_IMPORTS[folder], f"{path}: {line.strip()}"


@pytest.mark.parametrize("module", FORBIDDEN)
def test_importing_brings_in_only_what_it_needs(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {FORBIDDEN[module]!r}))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_declared_packages_are_the_folders() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"}
    assert {f"tailserve.{folder.relative_to(ROOT)}".replace("/", ".") for folder in folders} == set(tool["packages"])
    assert {path.parent for path in SOURCES} == folders, "a folder of sources is no package"


def test_every_source_file_has_a_docstring() -> None:
    assert not [path for path in SOURCES if not path.read_text().startswith('"""')]
