"""A rendered release on real Ray: pods as restricted as the chart asks for, with what KubeRay would do to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from chart import render
from pods import Pod, bridge, can_make_namespaces

PROMPT = "Once upon a time, in a small village by the sea,"
CONFIG: dict[str, Any] = {
    "dtype": "float32",
    "num_kv_blocks": 2000,
    "cpu_threads": 1,
    "speculation": "off",
    "resources": {"router_cpus": 1, "verifier_cpus": 1, "ingress_cpus": 0.5},
    "timeouts": {"silence_s": 5},
    "num_instances": 2,
}
SPREAD = CONFIG | {
    "speculation": 3,
    "resources": {"placement": "PACK", "router_cpus": 1, "verifier_cpus": 1.5, "draft_cpus": 2.75, "ingress_cpus": 0.5},
    "num_instances": 1,
}
"""More than a node has; the ingress is where the router is, there is no room for it beside the draft."""
REDIS = "10.93.0.1:6399"

pytestmark = [
    # Two models and three nodes on the cores that CI has would take it over its time.
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root, and namespaces"),
]


class Release:
    """The pods of a release, and the call that KubeRay makes."""

    def __init__(self, work: Path, backend: str, config: dict[str, Any]) -> None:
        """`backend`: what outlives a head."""
        settings = {"config": config, "drainSeconds": 60, "gcsFaultTolerance": {"backend": backend, "redisAddress": REDIS}}
        self._rendered = render("minimal", *(f"{name}={json.dumps(value)}" for name, value in settings.items()))
        self._work, self._backend = work, backend
        self.head = self.start_head()
        self.workers = [self.start_worker(number) for number in (3, 4)]

    def start_head(self) -> Pod:
        group = self._rendered.cluster["headGroupSpec"]
        return self._start("head", 2, group, ["--head", "--port=6379"], self._storage())

    def _storage(self) -> dict[str, str]:
        """What KubeRay makes of `gcsFaultToleranceOptions`."""
        options = self._rendered.cluster["gcsFaultToleranceOptions"]
        if self._backend == "redis":
            return {"RAY_REDIS_ADDRESS": options["redisAddress"], "RAY_external_storage_namespace": "uid-of-the-release"}
        state = self._work / "state"
        state.mkdir(exist_ok=True)
        return {"RAY_gcs_storage": options["backend"], "RAY_gcs_storage_path": str(state)}

    def start_worker(self, number: int) -> Pod:
        (group,) = self._rendered.cluster["workerGroupSpecs"]
        return self._start(f"w{number}", number, group, ["--address=10.93.0.2:6379", "--num-cpus=3"], {})

    def _start(self, name: str, number: int, group: dict[str, Any], arguments: list[str], env: dict[str, str]) -> Pod:
        spec = group["template"]["spec"]
        flags = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        return Pod(name, number, spec, arguments + flags, self._work, **env)

    async def deploy(self) -> None:
        """What KubeRay's operator does with `serveConfigV2`."""
        async with httpx.AsyncClient(base_url=f"http://{self.head.ip}:8265") as dashboard:
            await eventually(lambda: self._put(dashboard), 120)
            await eventually(lambda: self.is_running(dashboard), 180)

    async def _put(self, dashboard: httpx.AsyncClient) -> bool:
        answer = await dashboard.put("/api/serve/applications/", json=self._rendered.serve_config)
        return answer.status_code == 200

    async def is_running(self, dashboard: httpx.AsyncClient) -> bool:
        applications = (await dashboard.get("/api/serve/applications/")).json()["applications"]
        return applications.get("tailserve", {}).get("status") == "RUNNING"

    async def replicas(self, deployment: str) -> dict[str, str]:
        """The node's address of each."""
        async with httpx.AsyncClient() as http:
            details = (await http.get(f"http://{self.head.ip}:8265/api/serve/applications/")).json()
        found = details["applications"]["tailserve"]["deployments"][deployment]["replicas"]
        return {replica["replica_id"]: replica["node_ip"] for replica in found if replica["state"] == "RUNNING"}

    def stop(self) -> None:
        for pod in (self.head, *self.workers):
            pod.kill()


async def eventually(holds: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if await holds():
                return
        except (httpx.TransportError, openai.APIError, KeyError):
            pass
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.5)


@pytest.fixture
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Short: sockets lie in it.
    return tmp_path_factory.mktemp("r")


@contextlib.contextmanager
def running(work: Path, backend: str, config: dict[str, Any] = CONFIG) -> Iterator[Release]:
    release = Release(work, backend, config)
    try:
        yield release
    finally:
        release.stop()


@contextlib.contextmanager
def redis(work: Path) -> Iterator[None]:
    """At the machine's own address in the pods' network."""
    host, port = REDIS.split(":")
    command = ["redis-server", "--bind", host, "--port", port, "--dir", str(work), "--protected-mode", "no"]
    with (work / "redis.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def complete(pod: Pod, max_tokens: int, begun: asyncio.Event | None = None) -> str:
    """A streamed completion through the proxy of a pod."""
    async with openai.AsyncOpenAI(base_url=f"http://{pod.ip}:8000/v1", api_key="-", max_retries=0, timeout=120) as client:
        stream = await client.completions.create(
            model="SmolLM2-135M-Instruct",
            prompt=PROMPT,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if begun is not None:
                begun.set()
        return text


async def drafts(pod: Pod, text: str) -> bool:
    """Whether a text that repeats itself gets draft tokens accepted."""
    async with openai.AsyncOpenAI(base_url=f"http://{pod.ip}:8000/v1", api_key="-", max_retries=0, timeout=120) as client:
        answer = await client.completions.create(
            model="SmolLM2-135M-Instruct", prompt=text * 2, max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    return bool(answer.usage.completion_tokens_details.accepted_prediction_tokens)


async def answers(pod: Pod) -> bool:
    return bool(await complete(pod, 1))


async def test_a_release_lives_through_what_happens_to_pods(work: Path) -> None:
    with bridge(), running(work, "rocksdb") as release:
        expected = await _deploy(release)
        first, second = release.workers
        assert sorted((await release.replicas("Router")).values()) == [first.ip, second.ip], "instances are spread"
        await eventually(lambda: _exports(release.workers), 30)
        await _lose_the_head(release, expected)
        (home,) = (await release.replicas("Ingress")).values()
        stays, goes = (first, second) if home == first.ip else (second, first)
        await _cut_off(goes, stays, expected)
        await _drain(stays, expected)


@pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server")
async def test_a_head_finds_in_redis_what_the_one_before_knew(work: Path) -> None:
    with bridge(), redis(work), running(work, "redis") as release:
        await _lose_the_head(release, await _deploy(release))


async def test_an_instance_over_two_nodes_loses_its_draft_and_goes_on(work: Path) -> None:
    with bridge(), running(work, "rocksdb", SPREAD) as release:
        expected = await _deploy(release)
        # The text repeats itself: n-grams know how it goes on.
        (home,) = (await release.replicas("Router")).values()
        (goes,) = (pod for pod in release.workers if pod.ip != home)
        (stays,) = (pod for pod in release.workers if pod.ip == home)
        # Drafted on the other node; the draft comes up beside the first requests.
        await eventually(partial(drafts, stays, expected), 30)
        streams = await _open(stays, 4)
        goes.cut_off()
        assert await asyncio.gather(*streams) == [expected] * 4


async def _deploy(release: Release) -> str:
    """What a request is answered with."""
    await release.deploy()
    # Serve has a proxy where it has replicas.
    homes = set((await release.replicas("Router")).values())
    pods = [pod for pod in release.workers if pod.ip in homes]
    for pod in pods:
        await eventually(partial(answers, pod), 60)
    return await complete(pods[0], 60)


async def _exports(pods: list[Pod]) -> bool:
    """Whether the pods' metrics port has what alerts and dashboard ask for."""
    async with httpx.AsyncClient() as http:
        text = "".join([(await http.get(f"http://{pod.ip}:8080/metrics")).text for pod in pods])
    names = set(re.findall(r"^(ray_tailserve_\w+)", text, re.MULTILINE))
    wanted = {"time_to_first_token_seconds_bucket", "request_time_per_output_token_seconds_bucket", "num_requests_running"}
    wanted |= {"num_requests_waiting", "kv_cache_usage_perc", "host_kv_cache_usage_perc"}
    either = {f"ray_tailserve_slo_{name}_total" for name in ("attained", "missed")}
    return {f"ray_tailserve_{name}" for name in wanted} <= names and bool(either & names)


async def _lose_the_head(release: Release, expected: str) -> None:
    worker = release.workers[0]
    routers = await release.replicas("Router")
    streams = await _open(worker, 4)
    release.head.kill()
    begin = time.monotonic()
    short = await complete(worker, 4)
    assert expected.startswith(short)
    assert [await complete(worker, 4) for _ in range(19)] == [short] * 19
    release.head = release.start_head()
    assert await asyncio.gather(*streams) == [expected] * 4
    async with httpx.AsyncClient(base_url=f"http://{release.head.ip}:8265") as dashboard:
        await eventually(lambda: release.is_running(dashboard), 120)
    assert await release.replicas("Router") == routers, "the same instances as before"
    print(f"head: 4 streams and 20 requests went on, a new one had the application after {time.monotonic() - begin:.0f} s")


async def _cut_off(goes: Pod, stays: Pod, expected: str) -> None:
    streams = await _open(stays, 12)
    begin = time.monotonic()
    goes.cut_off()
    assert await asyncio.gather(*streams) == [expected] * 12
    print(f"cut off: 12 streams at two nodes were complete {time.monotonic() - begin:.0f} s after one was out of reach")


async def _drain(goes: Pod, expected: str) -> None:
    streams = await _open(goes, 12)
    begin = time.monotonic()
    goes.terminate()
    async with httpx.AsyncClient() as http:
        await eventually(lambda: _is_unready(http, goes), 10)
    unready = time.monotonic() - begin
    assert await asyncio.gather(*streams) == [expected] * 12
    print(f"drain: unready after {unready:.1f} s, 12 of 12 streams complete")


async def _is_unready(http: httpx.AsyncClient, pod: Pod) -> bool:
    return (await http.get(f"http://{pod.ip}:8000/-/healthz")).status_code == 503


async def _open(pod: Pod, count: int) -> list[asyncio.Task[str]]:
    """Streams that have begun."""
    begun = [asyncio.Event() for _ in range(count)]
    tasks = [asyncio.create_task(complete(pod, 60, event)) for event in begun]
    await asyncio.gather(*(event.wait() for event in begun))
    return tasks
