"""The router: one replica is the brain of one model instance."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve import metrics

from tailserve.cluster import placement
from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.deployments.collector import keep_collector_out_of_steps
from tailserve.deployments.draft import DraftLink, DraftOptions
from tailserve.deployments.draft_kinds import plan_draft
from tailserve.deployments.logs import log_with_serve, logging_config
from tailserve.deployments.loop import EngineLoop
from tailserve.deployments.metrics import Page
from tailserve.deployments.models import model_name
from tailserve.deployments.process import ModelProcess
from tailserve.deployments.requests import RequestInlet
from tailserve.deployments.sizes import engine_settings, load_options
from tailserve.deployments.sockets import open_sockets
from tailserve.deployments.streams import ORPHAN_S, Outboxes
from tailserve.deployments.telemetry import InstanceMetrics
from tailserve.deployments.tracing import open_tracer
from tailserve.deployments.verifier import VerifierExecutor
from tailserve.engine.engine import Engine
from tailserve.engine.errors import NotReadyError, TailserveError
from tailserve.engine.slo import guarded_classes
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import Request, TokenChunk

logger = logging.getLogger(__name__)


class Router:
    """Starts the verifier and the draft of its instance, and owns queue, scheduler and block tables.

    A replica is ready when its model is loaded. It touches token ids and block numbers only.
    """

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        log_with_serve()
        self._config = parse_config(config)
        self._instance = serve.get_replica_context().replica_id.unique_id
        # Socket files live here; mkdtemp makes it private to this user.
        self._directory = Path(tempfile.mkdtemp(prefix="tailserve-"))
        self._outboxes = Outboxes(self._instance)
        self._sweeper: asyncio.Task[None] | None = None
        self._requests = RequestInlet(self._directory / "requests", self._accept)
        try:
            # Nobody hears of it before this replica is ready.
            await self._requests.open()
            await asyncio.to_thread(self._start)
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        keep_collector_out_of_steps()
        name = self._config.served_model_name or model_name(self._config.model)
        self._metrics = InstanceMetrics(Page(metrics, model_name=name, instance=self._instance))
        self._sweeper = asyncio.create_task(self._sweep())

    def _start(self) -> None:
        config = self._config
        options = load_options(config)
        plan = plan_draft(config, options, str(self._directory))
        self._sockets = open_sockets(self._directory)
        if config.resources.placement != "STRICT_PACK":
            host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            self._sockets = open_sockets(self._directory, host)
        self._executor = VerifierExecutor(
            plan.verifier,
            sockets=self._sockets,
            first_bundle=placement.VERIFIER_BUNDLE,
            actor_options=placement.verifier_actor_options(config),
            load_timeout_s=config.timeouts.load_s,
            step_timeout_s=config.timeouts.step_s,
        )
        self._info = self._executor.start()
        # A restarted verifier must have the blocks that the scheduler counts on.
        self._executor.load_options = msgspec.structs.replace(
            plan.verifier, load=msgspec.structs.replace(plan.verifier.load, num_blocks=self._info.num_blocks)
        )
        self._draft = None if plan.draft is None else self._start_draft(plan.draft)
        engine_config = engine_settings(config, self._info, num_outcomes=plan.num_outcomes)
        self._engine = Engine(engine_config, self._executor, self._draft)
        self._tracer = open_tracer(config.otlp_traces_endpoint, "router")
        self._traced: dict[str, str] = {}
        """Requests that run to their traceparent."""
        publish = self._outboxes.publish if self._tracer is None else self._trace_and_publish
        self._loop = EngineLoop(self._engine, engine_config.classes, publish)

    def _start_draft(self, options: DraftOptions) -> DraftLink:
        config = self._config
        link = DraftLink(
            msgspec.structs.replace(options, verifier_num_blocks=self._info.num_blocks),
            sockets=self._sockets,
            bundle_index=placement.draft_bundle(config),
            actor_options=placement.draft_actor_options(config),
            load_timeout_s=config.timeouts.load_s,
            hang_s=config.timeouts.draft_hang_s,
        )
        link.start()
        return link

    async def submit(
        self, request: bytes, ingress: str, *, instance: str | None, tokens_at: str
    ) -> tuple[str, str, TailserveError | None]:
        """Accepts an encoded `Request`. Returns this instance's name, to read the stream from, and where it takes further
        ones from ingresses of its node (see `RequestInlet`).

        `instance`: the one that was meant, by which `InstanceRequestRouter` went; None for any. `tokens_at`: where the
        ingress listens, for routers of its node.

        Refusals (see `EngineLoop.submit`) are returned beside them, not raised: Serve logs a traceback for whatever a
        replica raises, and being full is no accident.
        """
        del instance
        return self._instance, self._requests.address, self._accept(request, ingress, tokens_at)

    def _accept(self, request: bytes, ingress: str, tokens_at: str) -> TailserveError | None:
        decoded = msgspec.msgpack.decode(request, type=Request)
        if decoded.traceparent and self._tracer is not None:
            self._traced[decoded.id] = decoded.traceparent
        self._outboxes.connect(ingress, tokens_at)
        try:
            self._loop.submit(decoded, ingress)
        except TailserveError as error:
            self._traced.pop(decoded.id, None)
            return error
        self._outboxes.open_request(ingress)
        return None

    def _trace_and_publish(self, by_ingress: Mapping[str, list[TokenChunk]], load: InstanceLoad) -> None:
        assert self._tracer is not None
        self._outboxes.publish(by_ingress, load)
        for chunks in by_ingress.values():
            for chunk in chunks:
                if chunk.finish_reason is None or (trace := self._traced.pop(chunk.request_id, None)) is None:
                    continue
                if chunk.timeline is not None:
                    self._tracer.add_timeline(trace, chunk.timeline)

    async def stream(self, ingress: str, *, instance: str) -> AsyncIterator[bytes]:
        """Encoded `StepMessage`s for one ingress, while it has requests here."""
        self._check_instance(instance)
        async for data in self._outboxes.read(ingress):
            yield data

    async def abort(self, request_ids: list[str], *, instance: str) -> None:
        """Ends requests; their streams get a last chunk."""
        self._check_instance(instance)
        self._loop.abort(request_ids)

    async def drop_session(self, tenant: str, session_id: str) -> int:
        """Frees what is kept of a session. Returns how many KV blocks that were."""
        return await asyncio.wrap_future(self._loop.drop_session(tenant, session_id))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `InstancePolicy` decides by; Serve asks for it once a second."""
        return self._loop.report()

    async def status(self) -> dict[str, Any]:
        """What this instance is, and how it does."""
        return {
            "instance": self._instance,
            "pid": os.getpid(),
            "model": msgspec.to_builtins(self._info),
            "load": msgspec.to_builtins(self._engine.gauges()),
            "stats": msgspec.to_builtins(self._engine.stats),
            "paces": {name: {"cap": pace.cap, "p99_s": pace.p99_s} for name, pace in self._engine.paces().items()},
            "step_time_error": dict(zip(("p50", "p99"), self._engine.prediction_errors(), strict=True)),
        }

    async def metrics(self) -> str:
        """This instance's part of `/metrics`."""
        return self._metrics.text(self._engine)

    async def processes(self) -> dict[str, int]:
        """Process ids of the model processes, by name."""
        wanted: list[ModelProcess[Any, Any]] = [*self._executor.processes]
        if self._draft is not None:
            wanted.append(self._draft.process)
        return {process.name: await asyncio.to_thread(process.pid) for process in wanted}

    async def check_idle_integrity(self, timeout_s: float) -> str | None:
        """Waits until nothing runs, then checks that all blocks are accounted for. What is wrong, or None."""
        if not await asyncio.to_thread(self._loop.wait_idle, timeout_s):
            return f"still busy after {timeout_s:g} s: {self._engine.gauges()}"
        try:
            self._engine.check_integrity()
        except AssertionError as error:
            return str(error)
        return None

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._loop.failure is not None:
            raise RuntimeError("the engine stopped") from self._loop.failure
        if self._engine.broken:
            raise RuntimeError("the verifier could not be restarted")

    async def __del__(self) -> None:
        if self._sweeper is not None:  # it has started
            self._sweeper.cancel()
            self._requests.close()
            await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self._loop.stop()
        self._outboxes.close()
        if self._draft is not None:
            self._draft.stop()
        self._executor.stop()
        if self._tracer is not None:
            self._tracer.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _check_instance(self, instance: str) -> None:
        if instance != self._instance:
            raise NotReadyError(f"instance {instance} is gone")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(ORPHAN_S / 2)
            try:
                self._metrics.note(self._engine)
            except Exception:
                logger.exception("metrics could not be noted")
            for ingress in self._outboxes.orphans():
                logger.warning("ingress %s is gone; its requests end", ingress)
                self._loop.abort_ingress(ingress)


def deployment(config: TailserveConfig) -> Any:
    """The Serve application node of `num_instances` routers."""
    node: Any = serve.deployment(
        Router,
        name="Router",
        **_scale(config),
        ray_actor_options={"num_cpus": config.resources.router_cpus},
        placement_group_bundles=placement.bundles(config),
        placement_group_strategy=config.resources.placement,
        # The engine does the queueing: Serve passes everything on. A stream counts as one call.
        max_ongoing_requests=100_000,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=config.timeouts.drain_s,
        request_router_config={
            "request_router_class": "tailserve.cluster.request_router:InstanceRequestRouter",
        },
        logging_config=logging_config(config.log_format),
    )
    # Without the number of replicas: to change it must not start those anew that there are.
    return node.bind(config.model_dump(mode="json", exclude={"num_instances", "autoscaling"}))


def _scale(config: TailserveConfig) -> dict[str, Any]:
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.num_instances}
    settings = {
        "utilization": scaling.utilization,
        "least": scaling.min_instances,
        "least_by_class": {slo.name: slo.min_instances for slo in config.slo_classes if slo.min_instances},
        "urgent": sorted(guarded_classes(config.classes())),
    }
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_instances,
            "initial_replicas": config.num_instances,
            "max_replicas": scaling.max_instances,
            "upscale_delay_s": 0.0,
            # How often instances say how busy they are: every 10 s by default, in which first tokens come late.
            "metrics_interval_s": 1.0,
            "downscale_delay_s": scaling.downscale_delay_s,
            "policy": {"policy_function": "tailserve.cluster.autoscaling_policy:InstancePolicy", "policy_kwargs": settings},
        }
    }
