"""What the chart makes, against the schemas of what it makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from chart import CHART, CUSTOM, EXAMPLES, ROOT, complaints, refusal, render, run_helm

from tailserve.cluster.config import parse_config
from tailserve.cluster.settings import SERVE_ENVIRONMENT

ALL = [None, *EXAMPLES]


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("example", ALL)
def test_helm_has_nothing_to_say_against_it(version: int, example: str | None) -> None:
    files = [] if example is None else ["-f", str(CHART / "examples" / f"{example}.yaml")]
    done = run_helm(version, "lint", "--strict", str(CHART), *files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("example", ALL)
def test_both_helms_make_the_same(example: str | None) -> None:
    assert render(example, version=3) == render(example, version=4)


@pytest.mark.parametrize("kubernetes", ["1.27", "1.37"])
@pytest.mark.parametrize("example", ALL)
def test_every_built_in_kind_is_valid(example: str | None, kubernetes: str) -> None:
    rendered = render(example)
    things = [thing for (kind, _), thing in rendered.objects.items() if kind not in CUSTOM]
    things += [pod(group["template"]) for group in rendered.groups]
    for thing in things:
        # An unknown kind is a warning only, and warnings are errors here.
        kubernetes_validate.validate(thing, kubernetes, strict=True)


@pytest.mark.parametrize("example", ALL)
def test_every_custom_resource_is_valid(example: str | None) -> None:
    for (kind, _), thing in render(example).objects.items():
        if kind in CUSTOM:
            assert complaints(thing) == []


def test_the_schemas_refuse_what_is_wrong() -> None:
    thing = json.loads(json.dumps(render().objects["RayService", "llm-tailserve"]))
    thing["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    assert len(complaints(thing)) == 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("configg={}", "configg"),
        ('config={"max_num_seq": 3}', "max_num_seq"),
        ('config={"speculation": "sometimes"}', "speculation"),
        ('config={"slo_classes": [{"name": "a", "priority": 1}]}', "ttft_s"),
        ('image.tag=""', "tag"),
        ("workerGroups=[]", "workerGroups"),
        ('upgrade.type="Sometimes"', "type"),
        ('upgrade.type="NewClusterWithIncrementalUpgrade"', "upgrade.gatewayClassName: name a GatewayClass"),
        ('gcsFaultTolerance.backend="redis"', "gcsFaultTolerance.redisAddress"),
        ('workerGroups=[{"name": "a", "minReplicas": 3, "maxReplicas": 2, "resources": {}}]', "is above maxReplicas"),
        ('workerGroups=[{"name": "A_1", "minReplicas": 1, "maxReplicas": 2, "resources": {}}]', "name"),
        ('fullnameOverride="' + "x" * 41 + '"', "fullnameOverride"),
        ("ingress.enabled=true", "ingress.hosts: name at least one"),
        (
            'upgrade={"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "g"},ingress.enabled=true',
            "ingress.enabled: with upgrade.type",
        ),
        ("httpRoute.enabled=true", "httpRoute.parentRefs: name the Gateway"),
        ('modelCache={"enabled": true, "prefetch": {"enabled": true}}', "modelCache.prefetch.models: name the models"),
    ],
)
@pytest.mark.parametrize("version", [3, 4])
def test_wrong_values_are_refused_by_name(value: str, says: str, version: int) -> None:
    assert says in refusal(value, version=version)


def test_what_yaml_makes_of_off_is_taken(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("config: {speculation: off}\n")
    done = run_helm(4, "template", "llm", str(CHART), "-f", str(tmp_path / "values.yaml"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", ALL)
def test_the_application_takes_the_configuration(example: str | None) -> None:
    (application,) = render(example).serve_config["applications"]
    assert application["import_path"] == "tailserve.deployments.app:build"
    config = parse_config(application["args"])
    assert config.timeouts.drain_s == (300 if example == "gpu" else 120)
    # An instance is in one pod.
    group = render(example).groups[1]["template"]["spec"]["containers"][0]["resources"]["requests"]
    used = config.resources
    assert used.verifier_gpus * config.tensor_parallel_size + used.draft_gpus <= group.get("nvidia.com/gpu", 0)


@pytest.mark.parametrize("example", ALL)
def test_pods_end_after_their_streams(example: str | None) -> None:
    for group in render(example).groups:
        spec = group["template"]["spec"]
        env = environment(spec)
        drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert spec["terminationGracePeriodSeconds"] > drain
        (application,) = render(example).serve_config["applications"]
        assert drain > application["args"]["timeouts"]["drain_s"]
        assert "preStop" not in json.dumps(spec), "ray stop there would end the drain"


@pytest.mark.parametrize("example", ALL)
def test_pods_are_as_restricted_as_can_be(example: str | None) -> None:
    rendered = render(example)
    specs = [group["template"]["spec"] for group in rendered.groups]
    specs += [thing["spec"] for (kind, _), thing in rendered.objects.items() if kind == "Pod"]
    specs += [thing["spec"]["template"]["spec"] for (kind, _), thing in rendered.objects.items() if kind == "Job"]
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
    assert rendered.groups[1]["template"]["spec"]["automountServiceAccountToken"] is False


def test_pods_have_the_environment_that_serve_runs_fastest_with() -> None:
    for group in render().groups:
        env = environment(group["template"]["spec"])
        assert {name: env.get(name) for name in SERVE_ENVIRONMENT} == SERVE_ENVIRONMENT


def test_selectors_find_the_pods() -> None:
    rendered = render("cpu")
    head, worker = (group["template"]["metadata"]["labels"].items() for group in rendered.groups)
    budget = rendered.objects["PodDisruptionBudget", "llm-tailserve"]["spec"]["selector"]["matchLabels"].items()
    assert budget <= worker
    assert not budget <= head
    for kind, field in (("NetworkPolicy", "podSelector"), ("PodMonitor", "selector")):
        selector = rendered.objects[kind, "llm-tailserve"]["spec"][field]["matchLabels"].items()
        assert selector <= worker
        assert selector <= head


def test_a_strict_network_policy_lets_telemetry_out() -> None:
    collectors = {"otlp_traces_endpoint": "http://one:4319/v1/traces", "otlp_metrics_endpoint": "https://two/v1/metrics"}
    policy = render(
        "minimal", "networkPolicy.enabled=true", "networkPolicy.extraEgress=[]", f"config={json.dumps(collectors)}"
    )
    egress = policy.objects["NetworkPolicy", "llm-tailserve"]["spec"]["egress"]
    assert {4319, 443} <= {port["port"] for rule in egress for port in rule.get("ports", [])}


def test_a_strict_network_policy_leaves_the_ways_that_are_needed() -> None:
    policy = render("gpu", "networkPolicy.enabled=true").objects["NetworkPolicy", "llm-tailserve"]
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}
    assert {53, 443, 4318, 6379, 6443} <= ports
    policy = render("minimal", "networkPolicy.enabled=true", "networkPolicy.extraEgress=[]").objects
    ports = {
        port["port"] for rule in policy["NetworkPolicy", "llm-tailserve"]["spec"]["egress"] for port in rule.get("ports", [])
    }
    assert ports == {53}


def test_pods_keep_the_labels_that_kuberay_gives_them() -> None:
    for group in render().groups:
        assert not any(name.startswith("app.kubernetes.io/") for name in group["template"]["metadata"]["labels"])


def test_what_changes_no_pod_starts_no_new_cluster(tmp_path: Path) -> None:
    before = render("gpu").cluster
    other = tmp_path / "tailserve"
    shutil.copytree(CHART, other)
    text = (other / "Chart.yaml").read_text()
    (other / "Chart.yaml").write_text(text.replace("0.1.0", "7.8.9"))
    changed = render("gpu", 'commonLabels={"team": "a"}', 'commonAnnotations={"a": "b"}', chart=other)
    assert "7.8.9" in json.dumps(changed.objects["RayService", "llm-tailserve"]["metadata"])
    assert changed.cluster == before
    # Nor does the application's configuration: it is rolled out in the cluster that runs.
    assert render("gpu", "config.max_num_seqs=64").cluster == before
    for value in ('image.tag="0.2.0"', "drainSeconds=301", "head.numCpus=1", 'hubTokenSecret.name="other"'):
        assert render("gpu", value).cluster != before


def test_more_instances_start_none_anew() -> None:
    before, after = (render("cpu", f"config.num_instances={count}").serve_config["applications"][0] for count in (2, 3))
    assert before["args"] == after["args"]
    assert after["deployments"] == [{"name": "Router", "num_replicas": 3}]
    (scaled,) = render("gpu").serve_config["applications"]
    assert "deployments" not in scaled
    assert scaled["args"]["autoscaling"]["max_instances"] == 4


@pytest.mark.parametrize("example", EXAMPLES)
def test_names_are_short_enough_for_kuberay(example: str) -> None:
    name = render(example, 'fullnameOverride="' + "x" * 40 + '"').objects
    assert all(len(own) <= 47 for kind, own in name if kind == "RayService")


def test_what_is_generated_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "helm" / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_image_is_clean() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "helm" / "image" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_has_what_the_build_reads() -> None:
    lines = (ROOT / "helm" / "image" / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = [line.split()[1:-1] for line in (ROOT / "helm/image/Dockerfile").read_text().splitlines()
              if line.startswith("COPY") and "--from" not in line]  # fmt: skip
    assert {name for names in copied for name in names} <= let_in
    assert all((ROOT / name).exists() for name in let_in)


def test_helm_prints_what_to_do_next() -> None:
    done = run_helm(4, "install", "llm", str(CHART), "--dry-run=client", "--namespace", "serving")
    assert done.returncode == 0, done.stderr
    assert "rayservice/llm-tailserve" in done.stdout
    assert "Anybody who reaches it may use it" in done.stdout


def pod(template: dict[str, Any]) -> dict[str, Any]:
    """What KubeRay makes of a template."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}, "spec": template["spec"]}


def environment(spec: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"] if "value" in entry}
