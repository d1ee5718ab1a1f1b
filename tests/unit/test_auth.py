"""API keys and tenants' limits, through HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from edge import Edge

from tailserve.cluster.config import parse_config
from tailserve.cluster.files import with_tenants_of_file
from tailserve.cluster.tenants import TenantConfig, hash_key, new_key
from tailserve.deployments import tenants_file
from tailserve.deployments.auth import Gate, Tenant
from tailserve.deployments.cli import main
from tailserve.deployments.tenants_file import follow_tenants
from tailserve.engine.errors import AuthenticationError, ConfigError, ForbiddenError, QueueFullError

GOLD, FREE = new_key(), new_key()
TENANTS = [
    {"name": "gold", "api_key_hashes": [hash_key(GOLD)]},
    {"name": "free", "api_key_hashes": [hash_key(FREE)], "classes": ["normal"], "max_concurrent_requests": 1},
]


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    edge = Edge(tmp_path, settings={"tenants": TENANTS})
    await edge.open()
    yield edge
    await edge.settle()
    await edge.close()


async def post(edge: Edge, key: str | None, **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return await edge.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2} | body, headers=headers)


@pytest.mark.parametrize("key", [None, "sk-", "sk-unknown"])
async def test_no_key_or_an_unknown_one(edge: Edge, key: str | None) -> None:
    response = await post(edge, key)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert (await edge.http.get("/v1/models")).status_code == 401
    assert (await edge.http.get("/health")).status_code == 200


async def test_the_official_client_with_its_key(edge: Edge) -> None:
    client = edge.client.with_options(api_key=GOLD)
    answer = await client.completions.create(
        model="tiny", prompt="ab", max_tokens=2, extra_headers={"X-SLO-Class": "critical"}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    with pytest.raises(openai.AuthenticationError):
        await edge.client.with_options(api_key="sk-wrong").completions.create(model="tiny", prompt="ab")


async def test_a_class_that_the_tenant_may_not_use(edge: Edge) -> None:
    for asked in ({"service_tier": "priority"}, {"priority": -1}):
        response = await post(edge, FREE, **asked)
        assert response.status_code == 403
        assert "may not use class 'critical', but normal" in response.json()["error"]["message"]
    assert (await post(edge, FREE)).status_code == 200
    assert (await post(edge, GOLD, service_tier="priority")).status_code == 200


async def test_who_may_not_use_the_default_class_gets_the_first_of_its_own(edge: Edge) -> None:
    config = TenantConfig(name="t", api_key_hashes=(hash_key("k"),), classes=("critical",))
    tenant = Tenant(config, 1, time.monotonic)
    assert tenant.choose_class(None, "normal") == "critical"
    with pytest.raises(ForbiddenError):
        tenant.choose_class("normal", "normal")
    response = await edge.http.post(
        "/v1/completions",
        json={"prompt": "a"},
        headers={"X-SLO-Class": "critical", "Authorization": f"Bearer {FREE}"},
    )
    assert response.status_code == 403


async def test_requests_of_others_cannot_be_ended(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.01
    headers = {"Authorization": f"Bearer {GOLD}"}
    body = {"prompt": "ab", "max_tokens": 100, "stream": True, "request_id": "mine"}
    async with edge.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200
        for key, status in ((FREE, 404), (GOLD, 200)):
            bearer = {"Authorization": f"Bearer {key}"}
            ended = await edge.http.post("/abort_request", json={"request_id": "mine"}, headers=bearer)
            assert ended.status_code == status


async def test_no_more_at_once_than_allowed(edge: Edge) -> None:
    edge.calls.executor.step_s = 0.01
    headers = {"Authorization": f"Bearer {FREE}"}
    body = {"prompt": "ab", "max_tokens": 100, "stream": True}
    async with edge.http.stream("POST", "/v1/completions", json=body, headers=headers):
        response = await post(edge, FREE)
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "concurrency_limit_exceeded"
        assert float(response.headers["Retry-After"]) >= 1
    await edge.settle()
    # What was refused or ended counts no longer.
    assert (await post(edge, FREE, prompt="")).status_code == 400
    assert (await post(edge, FREE)).status_code == 200


def test_a_rate_is_kept_and_says_when_to_come_back() -> None:
    now = 0.0
    config = TenantConfig(name="t", api_key_hashes=(hash_key("k"),), requests_per_minute=60)
    tenant = Tenant(config, 1, lambda: now)
    for _ in range(10):
        tenant.enter()
    with pytest.raises(QueueFullError) as caught:
        tenant.enter()
    assert caught.value.retry_after_s == pytest.approx(1.0)
    now += caught.value.retry_after_s
    tenant.enter()


@pytest.mark.parametrize(
    ("tenants", "match"),
    [
        ([TENANTS[0], TENANTS[0]], "twice"),
        ([TENANTS[0] | {"classes": ["silver"]}], "'silver', which is no class"),
        ([TENANTS[0] | {"api_key_hashes": ["sk-secret"]}], "64 hexadecimal digits"),
    ],
)
def test_tenants_that_cannot_be(tenants: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config({"tenants": tenants})


def test_the_command_prints_a_key_and_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key"]) == 0
    key, digest = (line.split()[-1] for line in capsys.readouterr().out.splitlines())
    assert hash_key(key) == digest


async def test_keys_are_given_out_and_taken_back_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tenants_file, "REREAD_S", 0.01)
    file = tmp_path / "tenants.yaml"

    def write(*tenants: dict[str, Any]) -> None:
        file.write_text(json.dumps(tenants))

    limited = TENANTS[1] | {"classes": None}
    write(limited)
    config = parse_config({"tenants_file": str(file)})
    gate = Gate(with_tenants_of_file(config).tenants)
    following = asyncio.get_running_loop().create_task(follow_tenants(config, gate))

    async def settled(key: str, name: str | None) -> None:
        async with asyncio.timeout(5):
            while True:
                try:
                    found = gate.identify({"authorization": f"Bearer {key}"}).name
                except AuthenticationError:
                    found = None
                if found == name:
                    return
                await asyncio.sleep(0.01)

    leave = gate.identify({"authorization": f"Bearer {FREE}"}).enter()
    write(limited, TENANTS[0])
    await settled(GOLD, "gold")
    with pytest.raises(QueueFullError):  # what runs still counts
        gate.identify({"authorization": f"Bearer {FREE}"}).enter()
    write(limited | {"max_concurrent_requests": 2}, TENANTS[0])
    async with asyncio.timeout(5):
        while True:
            try:
                gate.identify({"authorization": f"Bearer {FREE}"}).enter()
                break
            except QueueFullError:
                await asyncio.sleep(0.01)
    write(TENANTS[0])
    await settled(FREE, None)
    leave()
    for wrong in ("- [", "[]", "gold: {}"):
        caplog.clear()
        file.write_text(wrong)
        async with asyncio.timeout(5):
            while "the tenants stay as they were" not in caplog.text:
                await asyncio.sleep(0.01)
        await settled(GOLD, "gold")
        await settled("", None)
    following.cancel()
