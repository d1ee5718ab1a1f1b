"""The request router as Serve runs it: in another process, from a pickle."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter

from tailserve.cluster import affinity

STRANGER = affinity.Placing("critical", 100)


class Name(NamedTuple):
    unique_id: str


REPLICAS = [SimpleNamespace(replica_id=Name(name)) for name in ("a", "b")]


def router_class() -> Any:
    config = RequestRouterConfig(request_router_class="tailserve.cluster.request_router:InstanceRequestRouter")
    return config.get_request_router_class()


async def choose(**kwargs: object) -> list[list[str]]:
    ranks = await router_class().choose_replicas(None, REPLICAS, SimpleNamespace(kwargs=kwargs))
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def test_a_named_instance_is_the_only_choice_while_it_is_there() -> None:
    assert await choose(instance="b") == [["b"]]
    assert await choose(instance="gone") == [["a", "b"]]
    assert await choose(instance=None) == [["a", "b"]]


def test_it_tells_its_process_which_instances_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def update(self: Any, replicas: list[Any]) -> None:
        self._replicas = {replica.replica_id: replica for replica in replicas}

    monkeypatch.setattr(RequestRouter, "update_replicas", update)
    monkeypatch.setattr(RequestRouter, "on_replica_actor_died", lambda self, name: self._replicas.pop(name))
    kind = router_class()
    router = kind.__new__(kind)
    router.update_replicas(REPLICAS[1:])
    assert affinity.LOADS.choose(STRANGER, time.monotonic()) == "b"
    router.update_replicas(REPLICAS)
    router.on_replica_actor_died(REPLICAS[1].replica_id)
    assert affinity.LOADS.choose(STRANGER, time.monotonic()) == "a"
    router.update_replicas([])
    assert affinity.LOADS.choose(STRANGER, time.monotonic()) is None
