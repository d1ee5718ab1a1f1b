"""A real Prometheus scrapes a server under load, both ways: every query of the dashboard and the alerts has an answer, and
no counter goes backwards when a verifier dies. Slow."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml
from chart import CHART, render, tool
from harness import free_port, local_ray
from ray import serve

from tailserve.cluster.config import parse_config
from tailserve.deployments.app import build_app

OWN = {"release": "llm", "namespace": "serving"}
"""What the chart's PodMonitor says of its pods."""
LOAD_S = 75.0
"""Ray passes metrics on every 10 s, and a rate needs some of these."""
CONFIG = {
    "dtype": "float32",
    "served_model_name": "demo",
    "max_num_seqs": 3,
    "max_model_len": 1024,
    "num_kv_blocks": 64,
    "kv_offloading_size": 0.1,
    "speculation": 3,
    "slo_classes": [
        # In time, but while the verifier is away.
        {"name": "critical", "priority": 0, "ttft_s": 1.0, "tpot_s": 0.2},
        {"name": "normal", "priority": 10, "ttft_s": 30.0, "tpot_s": 5.0, "max_queued": 2},
    ],
}


class Prometheus:
    """One that runs."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.at: float | None = None
        """What moment is asked for, in seconds since 1970; None is now."""

    def query(self, expression: str) -> list[dict[str, Any]]:
        at = {} if self.at is None else {"time": self.at}
        answer = self._http.get("/api/v1/query", params={"query": expression} | at).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]  # type: ignore[no-any-return]

    def ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with local_ray(num_cpus=8) as port:
        serve.run(build_app(parse_config(CONFIG)), name="tailserve", route_prefix="/")
        yield port


@pytest.fixture(scope="module")
def prometheus(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It reads the server's own page, and what Ray has of it, with the chart's rules."""
    work, listen = tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{free_port()}"
    (node,) = ray.nodes()
    targets = {"server": f"127.0.0.1:{port}", "ray": f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"}
    (work / "rules.yaml").write_text(yaml.safe_dump(render("gpu").objects["PrometheusRule", "llm-tailserve"]["spec"]))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "2s"},
        "rule_files": [str(work / "rules.yaml")],
        "scrape_configs": [
            # The instance is the process, not the address that answers for all of them.
            {"job_name": name, "honor_labels": True, "static_configs": [{"targets": [target], "labels": OWN}]}
            for name, target in targets.items()
        ],
    }
    (work / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        tool("prometheus"),
        f"--config.file={work / 'prometheus.yaml'}",
        f"--storage.tsdb.path={work / 'data'}",
        f"--web.listen-address={listen}",
    ]
    with (
        (work / "log").open("w") as log,
        httpx.Client(base_url=f"http://{listen}") as http,
        subprocess.Popen(command, stderr=log) as process,
    ):
        try:
            found = Prometheus(http)
            while not found.ready():
                assert process.poll() is None, (work / "log").read_text()
                time.sleep(0.1)
            yield found
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def loaded(port: int, prometheus: Prometheus) -> Prometheus:
    """In the last moment of a load of both classes, in the midst of which a verifier died."""
    begin = time.time()
    asyncio.run(_load(port))
    prometheus.at = begin + LOAD_S - 3
    return prometheus


async def _load(port: int) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=120) as client:
        until = time.monotonic() + LOAD_S
        users = [_ask(client, user, until) for user in range(8)]
        await asyncio.gather(*users, _kill_a_verifier(LOAD_S / 3))


async def _ask(client: openai.AsyncOpenAI, user: int, until: float) -> None:
    """One of four is critical, and pauses. Normal ones chat; they wait, are refused, and are displaced."""
    critical = user % 4 == 0
    extra = {"service_tier": "priority" if critical else "default", "session_id": f"user-{user}"}
    said: list[Any] = []
    while time.monotonic() < until:
        said = [*said[-8:], {"role": "user", "content": f"I am {user}. Count on from 1, 2, 3, 4, 5, 6, 7, 8, 9, 10."}]
        try:
            answer = await client.chat.completions.create(
                model="demo",
                messages=said,
                max_tokens=40,
                temperature=0,
                extra_body=extra | {"ignore_eos": len(said) % 4 == 1},
            )
            said.append({"role": "assistant", "content": answer.choices[0].message.content})
        except openai.RateLimitError:
            said.pop()
            await asyncio.sleep(0.3)
        if critical:
            said.clear()
            await asyncio.sleep(1)


async def _kill_a_verifier(after_s: float) -> None:
    await asyncio.sleep(after_s)
    router = serve.get_deployment_handle("Router", "tailserve")
    pids: dict[str, int] = await asyncio.to_thread(lambda: router.processes.remote().result())
    os.kill(pids["verifier"], signal.SIGKILL)


def _panels() -> list[Any]:
    board = json.loads((CHART / "dashboards" / "tailserve.json").read_text())
    targets = [(panel["title"], target) for panel in board["panels"] for target in panel["targets"]]
    return [pytest.param(target["expr"], id=f"{title}: {target['legendFormat']}") for title, target in targets]


@pytest.mark.parametrize("expression", _panels())
def test_a_panel_shows_something(loaded: Prometheus, expression: str) -> None:
    result = loaded.query(expression.replace("$model", ".*").replace("$__rate_interval", "1m"))
    assert any(float(entry["value"][1]) > 0 for entry in result), result


def test_alerts_have_something_to_go_by(loaded: Prometheus) -> None:
    rules = render("gpu").objects["PrometheusRule", "llm-tailserve"]["spec"]["groups"][0]["rules"]
    for rule in rules:
        # Without what makes them silent while all is well.
        expression = re.sub(r" > [\d.]+ \* [\d.]+", "", rule["expr"]).replace("absent(", "(")
        assert loaded.query(expression), rule
        if "record" in rule:
            assert loaded.query(rule["record"]), rule
    assert not loaded.query('ALERTS{alertname="TailserveNoInstance"}')


@pytest.mark.parametrize(("job", "prefix"), [("server", "tailserve"), ("ray", "ray_tailserve")])
def test_no_counter_goes_backwards(loaded: Prometheus, job: str, prefix: str) -> None:
    counters = loaded.query(f'{{job="{job}", __name__=~"{prefix}_.*(_total|_count|_bucket|_sum)"}}[10m]')
    assert len(counters) > 100
    for counter in counters:
        values = [float(value) for _, value in counter["values"]]
        assert values == sorted(values), counter["metric"]
    (restarts,) = loaded.query(f'sum({prefix}_executor_restarts_total{{job="{job}"}})')
    assert float(restarts["value"][1]) == 1, "the verifier did not die"
