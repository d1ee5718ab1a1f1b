"""A release's life against an API server: install, upgrade, rollback, uninstall, by helm 3 and helm 4."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from chart import CHART, CUSTOM, complaints, render, tool
from kubernetes_api import KubernetesApi, serve

GENERATED = ("uid", "resourceVersion", "creationTimestamp", "managedFields")


class Cluster:
    """A release in it, as its operator would handle it."""

    def __init__(self, api: KubernetesApi, address: str, version: int, home: Path) -> None:
        self.api = api
        self._command = [tool(f"helm{version}"), "--kube-apiserver", address, "--namespace", "serving"]
        # Nothing of whoever runs the tests.
        self._environment = {"HOME": str(home), "KUBECONFIG": str(home / "none"), "PATH": os.environ["PATH"]}

    def helm(self, *arguments: str) -> str:
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, env=self._environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def roll_out(self, verb: str, *values: str) -> None:
        settings = [part for value in values for part in ("--set-json", value)]
        example = ["-f", str(CHART / "examples" / "gpu.yaml")]
        # The schemas are the server's here, not those of its OpenAPI.
        self.helm(verb, "llm", str(CHART), *example, *settings, "--disable-openapi-validation")

    @property
    def objects(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Those of the release, without what helm keeps for itself."""
        return {
            (place.kind, place.name): thing
            for place, thing in self.api.objects.items()
            if thing.get("type") != "helm.sh/release.v1"
        }

    def specification(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What was asked for of each object."""
        found: dict[tuple[str, str], dict[str, Any]] = json.loads(json.dumps(list(self.objects.values())))  # type: ignore[assignment]
        for thing in found:
            for name in GENERATED:
                thing["metadata"].pop(name, None)
        return {(thing["kind"], thing["metadata"]["name"]): thing for thing in found}

    @property
    def service(self) -> dict[str, Any]:
        return self.objects["RayService", "llm-tailserve"]


def wrong_with(thing: dict[str, Any]) -> list[str]:
    """What a server would refuse."""
    if thing["kind"] in CUSTOM:
        return complaints(thing)
    try:
        kubernetes_validate.validate(thing, "1.33", strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


@pytest.fixture(params=[3, 4])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    api = KubernetesApi(wrong_with)
    with serve(api) as address:
        yield Cluster(api, address, request.param, tmp_path)


def test_a_release_is_installed_changed_taken_back_and_removed(cluster: Cluster) -> None:
    cluster.roll_out("install")
    hooks = {("Pod", "llm-tailserve-test-smoke"), ("Pod", "llm-tailserve-test-stream")}
    assert set(cluster.objects) == set(render("gpu").objects) - hooks
    first, uids = cluster.specification(), {key: thing["metadata"]["uid"] for key, thing in cluster.objects.items()}

    cluster.roll_out("upgrade", "config.max_num_seqs=64", "podDisruptionBudget.enabled=false")
    assert "max_num_seqs: 64" in cluster.service["spec"]["serveConfigV2"]
    before = first["RayService", "llm-tailserve"]["spec"]
    assert cluster.service["spec"]["rayClusterConfig"] == before["rayClusterConfig"], "the cluster would start anew"
    assert ("PodDisruptionBudget", "llm-tailserve") not in cluster.objects

    cluster.roll_out("upgrade", 'image.tag="0.2.0"')
    assert ("PodDisruptionBudget", "llm-tailserve") in cluster.objects
    assert cluster.service["spec"]["rayClusterConfig"] != before["rayClusterConfig"]

    cluster.helm("rollback", "llm", "1")
    assert cluster.specification() == first
    kept = {key: thing["metadata"]["uid"] for key, thing in cluster.objects.items()}
    changed = {kind for kind, name in uids if kept[kind, name] != uids[kind, name]}
    # Those that an upgrade had removed.
    assert changed == {"PodDisruptionBudget", "Job"}, "removed and made again"

    cluster.helm("uninstall", "llm")
    assert {kind for kind, _ in cluster.objects} == {"PersistentVolumeClaim"}, "fetched models stay, and nothing else"


def test_the_server_refuses_what_its_schemas_do_not_know(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match="RayService 'llm-tailserve'"):
        cluster.roll_out("install", 'head.affinity={"nodeAfinity": {}}')


def test_an_upgrade_that_the_server_refuses_can_be_taken_back(cluster: Cluster) -> None:
    cluster.roll_out("install")
    first = cluster.specification()
    # The budget is another one by the time the service is refused.
    with pytest.raises(AssertionError, match="RayService 'llm-tailserve'"):
        cluster.roll_out("upgrade", 'head.affinity={"nodeAfinity": {}}', "podDisruptionBudget.minAvailable=2")
    assert cluster.specification() != first
    cluster.helm("rollback", "llm", "1")
    assert cluster.specification() == first
