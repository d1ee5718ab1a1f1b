"""The request router as Serve runs it: in another process, from a pickle."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from ray.serve.config import RequestRouterConfig

from tailserve.cluster import affinity
from tailserve.engine.stats import InstanceLoad

PLACING = affinity.Placing("critical", 100)


async def choose(**kwargs: object) -> list[list[str]]:
    config = RequestRouterConfig(request_router_class="tailserve.cluster.request_router:InstanceRequestRouter")
    router: Any = config.get_request_router_class()
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in ("a", "b")]
    ranks = await router.choose_replicas(None, replicas, SimpleNamespace(kwargs=kwargs))
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def test_it_reads_the_loads_that_the_streams_of_its_process_note() -> None:
    affinity.LOADS.note("a", InstanceLoad(5, {"critical": 3.0}, 0.001), time.monotonic())
    assert await choose(placing=PLACING) == [["b"]]
    affinity.LOADS.note("b", InstanceLoad(5, {"critical": 9.0}, 0.001), time.monotonic())
    assert await choose(placing=PLACING) == [["a"]]


async def test_a_named_instance_is_the_only_choice_while_it_is_there() -> None:
    assert await choose(instance="b") == [["b"]]
    assert await choose(instance="gone") == [["a", "b"]]
