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

FORBIDDEN = [
    (
        {"ray", "torch", "transformers"},
        [
            "tailserve.engine.engine",
            "tailserve.engine.sessions",
            "tailserve.engine.options",
            "tailserve.engine.speculation.ngram",
            "tailserve.deployments.http",
            "tailserve.deployments.cli",
        ],
    ),
    ({"ray"}, ["tailserve.engine.model.loading", "tailserve.engine.model.runner", "tailserve.engine.model.draft"]),
    ({"torch", "transformers"}, ["tailserve.deployments.ingress", "tailserve.deployments.router"]),
]
"""What importing modules must not bring in, measured in a fresh interpreter for each of these, one after the other."""
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


@pytest.mark.parametrize(("forbidden", "modules"), FORBIDDEN)
def test_importing_brings_in_only_what_it_needs(forbidden: set[str], modules: list[str]) -> None:
    code = "\n".join(
        [
            "import sys",
            *(f"import {name}; print(*('{name}: ' + x for x in set(sys.modules) & {forbidden!r}))" for name in modules),
        ]
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_declared_packages_are_the_folders() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"}
    assert {f"tailserve.{folder.relative_to(ROOT)}".replace("/", ".") for folder in folders} == set(tool["packages"])
    assert {path.parent for path in SOURCES} == folders, "a folder of sources is no package"


def test_every_source_file_has_a_docstring() -> None:
    assert not [path for path in SOURCES if not path.read_text().startswith('"""')]
