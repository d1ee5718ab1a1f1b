"""Alerts and dashboards: right PromQL over metrics that there are, and alerts that fire when they should."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import CHART, render, tool
from fakes import FakeExecutor, engine_config
from prometheus_client.parser import text_string_to_metric_families

from tailserve.deployments.metrics import Page
from tailserve.deployments.telemetry import InstanceMetrics, RequestMetrics
from tailserve.engine.engine import Engine

OWN = {"release": "llm", "namespace": "serving", "model_name": "m", "slo_class": "critical"}


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The rules of the chart, as Prometheus reads them."""
    rule = render("gpu").objects["PrometheusRule", "llm-tailserve"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    return tmp_path / "rules.yaml"


def promtool(*arguments: str) -> None:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_the_rules(rules: Path) -> None:
    promtool("check", "rules", "--lint-fatal", str(rules))


@pytest.mark.parametrize(
    ("missed", "attained", "minutes", "fires"),
    [
        ("0+2x120", "0+8x120", 61, ["TailserveSloBurnsFast"]),
        # When nothing at all is in time there is no counter of what is.
        ("0+10x120", "_x120", 61, ["TailserveSloBurnsFast"]),
        ("0+1x120", "0+200x120", 61, []),
        ("_x120", "0+10x120", 61, []),
        ("0+1x500", "0+12x500", 400, ["TailserveSloBurns"]),
        # It was bad, and is over.
        ("0+5x30 150+0x200", "0+5x30 150+10x200", 120, []),
    ],
)
def test_alerts_fire_when_error_budgets_burn(
    rules: Path, missed: str, attained: str, minutes: int, fires: list[str]
) -> None:
    series = [
        {"series": f"ray_tailserve_slo_{name}_total{_labels(OWN)}", "values": values}
        for name, values in (("missed", missed), ("attained", attained))
    ]
    # Another release has the same model, and does badly.
    series.append({"series": f"ray_tailserve_slo_missed_total{_labels(OWN | {'release': 'staging'})}", "values": "0+9x500"})
    expected = [
        {
            "eval_time": f"{minutes}m",
            "alertname": name,
            "exp_alerts": [{"exp_labels": OWN | severity}] if name in fires else [],
        }
        for name, severity in (
            ("TailserveSloBurnsFast", {"severity": "critical"}),
            ("TailserveSloBurns", {"severity": "warning"}),
        )
    ]
    if "TailserveSloBurnsFast" in fires:
        # It burns, too.
        expected = expected[:1]
    # Annotations hold the value, which is no business of this test.
    stripped: dict[str, Any] = yaml.safe_load(rules.read_text())
    for rule in stripped["groups"][0]["rules"]:
        rule.pop("annotations", None)
    rules.write_text(yaml.safe_dump(stripped))
    test = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": expected}],
    }
    (rules.parent / "test.yaml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", str(rules.parent / "test.yaml"))


def test_an_alert_says_that_no_instance_reports_whatever_others_do(rules: Path) -> None:
    running = f"ray_tailserve_num_requests_running{_labels(OWN | {'release': 'staging'})}"
    expected = {"exp_labels": {"release": "llm", "namespace": "serving", "severity": "critical"}}
    stripped: dict[str, Any] = yaml.safe_load(rules.read_text())
    for rule in stripped["groups"][0]["rules"]:
        rule.pop("annotations", None)
    rules.write_text(yaml.safe_dump(stripped))
    case = {
        "interval": "1m",
        "input_series": [{"series": running, "values": "1x20"}],
        "alert_rule_test": [{"eval_time": "10m", "alertname": "TailserveNoInstance", "exp_alerts": [expected]}],
    }
    (rules.parent / "test.yaml").write_text(yaml.safe_dump({"rule_files": [str(rules)], "tests": [case]}))
    promtool("test", "rules", str(rules.parent / "test.yaml"))


def _labels(values: dict[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in values.items()) + "}"


def test_nobody_asks_for_a_metric_that_there_is_not() -> None:
    requests, instance = Page(model_name="m", instance="i"), Page(model_name="m", instance="i")
    RequestMetrics(requests, {})
    engine = Engine(engine_config(), FakeExecutor(engine_config()))
    engine.stats.accepted_by_position.append(1)
    InstanceMetrics(instance).note(engine)
    families = [family for page in (requests, instance) for family in text_string_to_metric_families(page.text())]
    kinds = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    known = {f"ray_{family.name}{kinds[family.type]}" for family in families}
    rule = json.dumps(render("gpu").objects["PrometheusRule", "llm-tailserve"])
    board = (CHART / "dashboards" / "tailserve.json").read_text()
    for text in (rule, board):
        asked = set(re.findall(r"ray_tailserve_\w+", text))
        assert len(asked) >= 3
        assert asked <= known


def test_grafana_gets_the_dashboard() -> None:
    config = render("cpu").objects["ConfigMap", "llm-tailserve-dashboards"]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert len(json.loads(config["data"]["tailserve.json"])["panels"]) == 18
