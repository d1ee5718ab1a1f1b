"""The chart, rendered by real helm, and the schemas that its objects must fit."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "tailserve"
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
SCHEMAS = ROOT.parent / "shared" / "k8s"
"""Strict schemas of custom resources, where there are any beside the checkout."""
CUSTOM = {"RayService", "PodMonitor", "PrometheusRule", "HTTPRoute"}


def tool(name: str) -> str:
    """A program that `tests/helm/fetch_tools` fetched."""
    directory = os.environ.get("HELM_TEST_TOOLS")
    if not directory:
        pytest.skip("HELM_TEST_TOOLS names no directory: tests/helm/fetch_tools fills one")
    return str(Path(directory) / name)


class Rendered(NamedTuple):
    """A release."""

    objects: dict[tuple[str, str], dict[str, Any]]
    """By kind and name."""

    @property
    def service(self) -> dict[str, Any]:
        (found,) = (value for (kind, _), value in self.objects.items() if kind == "RayService")
        return found["spec"]  # type: ignore[no-any-return]

    @property
    def cluster(self) -> dict[str, Any]:
        return self.service["rayClusterConfig"]  # type: ignore[no-any-return]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The head group, and those of workers."""
        return [self.cluster["headGroupSpec"], *self.cluster["workerGroupSpecs"]]

    @property
    def serve_config(self) -> dict[str, Any]:
        return yaml.safe_load(self.service["serveConfigV2"])  # type: ignore[no-any-return]


def run_helm(version: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool(f"helm{version}"), *arguments], capture_output=True, text=True)


@cache
def render(example: str | None = None, *values: str, version: int = 4, chart: Path = CHART) -> Rendered:
    """A release `llm` in the namespace `serving`; `values` as for --set-json."""
    files = [] if example is None else ["-f", str(CHART / "examples" / f"{example}.yaml")]
    settings = [part for value in values for part in ("--set-json", value)]
    done = run_helm(version, "template", "llm", str(chart), "--namespace", "serving", *files, *settings)
    assert done.returncode == 0, done.stderr
    objects = [thing for thing in yaml.safe_load_all(done.stdout) if thing]
    found = {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}
    assert len(found) == len(objects), "two objects of one kind and name"
    return Rendered(found)


def refusal(*values: str, version: int = 4) -> str:
    """What helm says to values that it must refuse."""
    settings = [part for value in values for part in ("--set-json", value)]
    done = run_helm(version, "template", "llm", str(CHART), *settings)
    assert done.returncode != 0, "accepted"
    return done.stderr


@cache
def custom_schema(kind: str) -> dict[str, Any]:
    found = list(SCHEMAS.glob(f"{kind}-*.json"))
    if not found:
        pytest.skip(f"no schema of {kind} in {SCHEMAS}")
    return json.loads(found[0].read_text())  # type: ignore[no-any-return]


def complaints(thing: dict[str, Any]) -> list[str]:
    """What a custom resource's schema has against it. The schema itself has patterns in Go's syntax."""
    return [error.message for error in jsonschema.Draft7Validator(custom_schema(thing["kind"])).iter_errors(thing)]
