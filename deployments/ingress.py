"""The ingress deployment: the HTTP edge in a Serve replica."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from ray import serve
from ray.serve import metrics
from starlette.applications import Starlette

from tailserve.cluster.affinity import LOADS, Placing
from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.cluster.files import with_tenants_of_file
from tailserve.deployments.client import RouterClient
from tailserve.deployments.collector import keep_collector_out_of_steps
from tailserve.deployments.generation import Choice
from tailserve.deployments.http import create_app
from tailserve.deployments.logs import log_with_serve, logging_config
from tailserve.deployments.metrics import Gatherer, Page
from tailserve.deployments.models import model_name, resolve_model
from tailserve.deployments.otlp_metrics import open_metrics
from tailserve.deployments.request_log import RequestLog
from tailserve.deployments.requests import RequestOutlets
from tailserve.deployments.service import Service
from tailserve.deployments.telemetry import RequestMetrics
from tailserve.deployments.tenants_file import follow_tenants
from tailserve.deployments.text import TextModel
from tailserve.deployments.tokens import TokenInlet
from tailserve.deployments.tracing import open_tracer
from tailserve.deployments.unanswered import Unanswered
from tailserve.engine.errors import NotReadyError, TailserveError
from tailserve.engine.types import FinishReason, ModelInfo, Request

logger = logging.getLogger(__name__)


METRICS_S = 2.0
"""How long whoever asks for metrics waits for all replicas."""


class ServeCalls:
    """`RouterCalls` over a Serve handle; requests to instances of this node go straight there, once they answered one."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._requests = RequestOutlets()
        self._unanswered = Unanswered()
        self.tokens_at = ""
        """Where routers of this node send tokens to; others have a stream."""

    async def submit(self, request: bytes, ingress: str, *, placing: Placing) -> tuple[str, TailserveError | None]:
        placing = placing._replace(avoid=placing.avoid | self._unanswered.silent())
        instance = LOADS.choose(placing, time.monotonic())
        with self._unanswered.asking(instance):
            if instance is not None and self._requests.reach(instance):
                return instance, await self._requests.submit(instance, request, ingress, self.tokens_at)
            try:
                taken: tuple[str, str, TailserveError | None] = await self._handle.submit.remote(
                    request, ingress, instance=instance, tokens_at=self.tokens_at
                )
            except Exception as error:
                # Ray's, gRPC's or Serve's. Whether the instance had taken the request or not, it is asked for no more.
                raise NotReadyError(f"the instance died before it took the request; try again ({error})") from error
        name, requests_at, refusal = taken
        await self._requests.connect(name, requests_at)
        return name, refusal

    async def stream(self, ingress: str, *, instance: str) -> AsyncIterator[bytes]:
        async for data in self._handle.options(stream=True).stream.remote(ingress, instance=instance):
            yield data

    async def abort(self, request_ids: list[str], *, instance: str) -> None:
        await self._handle.abort.remote(request_ids, instance=instance)

    async def drop_session(self, tenant: str, session_id: str) -> int:
        results = await self._handle.broadcast("drop_session", tenant, session_id).results_async()
        return sum(results)

    def close(self) -> None:
        self._requests.close()

    async def pages(self) -> list[str]:
        return await pages_of(self._handle)

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._handle.status.remote()
        return status


async def pages_of(handle: Any) -> list[str]:
    """The metrics of a deployment's replicas, but of those that fail. TimeoutError if one does not answer."""
    answers = await handle.broadcast("metrics").results_async(timeout_s=METRICS_S, return_exceptions=True)
    for error in answers:
        if not isinstance(error, str):
            logger.warning("no metrics of a replica of %s: %s", handle.deployment_name, error)
    return [answer for answer in answers if isinstance(answer, str)]


@serve.ingress()
class Ingress:
    """Stateless but for the requests that are open through it."""

    def __init__(self, config: dict[str, Any], router: Any) -> None:
        log_with_serve()
        given = parse_config(config)
        parsed = with_tenants_of_file(given)
        text = TextModel(resolve_model(parsed.model))
        self._calls = ServeCalls(router)
        client = RouterClient(self._calls, parsed.timeouts, max_open=parsed.max_open_requests)
        self._tokens = TokenInlet(client.receive)
        self._calls.tokens_at = self._tokens.address
        name = parsed.served_model_name or model_name(parsed.model)
        self._page = Page(metrics, model_name=name, instance=serve.get_replica_context().replica_id.unique_id)
        counts = RequestMetrics(self._page, {slo.name: slo for slo in parsed.classes()})
        log = RequestLog(parsed.log_requests)
        self._collected = open_metrics(parsed.otlp_metrics_endpoint, name)
        service = self._service = Service(parsed, text, client, name)

        def note_end(choice: Choice, reason: FinishReason) -> None:
            log.note(choice, reason, met=counts.note(choice, reason))
            if self._collected is not None:
                self._collected.note(choice, reason)

        def note_refusal(request: Request, error: TailserveError) -> None:
            log.note_refusal(request, error, met=counts.note_refusal(request, error))

        service.note_end, client.on_refusal = note_end, note_refusal
        service.note_gap = counts.note_gap
        service.tracer = open_tracer(parsed.otlp_traces_endpoint, "ingress")
        service.metrics = Gatherer({"ingresses": self._ingress_pages, "instances": self._calls.pages}).text
        self._peers = serve.get_deployment_handle("Ingress") if parsed.num_ingresses > 1 else None
        keep_collector_out_of_steps()
        loop = asyncio.get_event_loop()
        self._waiting = loop.create_task(self._wait_for_model())
        self._following = loop.create_task(follow_tenants(given, service.gate)) if given.tenants_file is not None else None

    def __serve_build_asgi_app__(self) -> Starlette:
        return create_app(self._service)

    async def metrics(self) -> str:
        """This ingress' part of `/metrics`."""
        return self._page.text()

    async def _ingress_pages(self) -> list[str]:
        return [self._page.text()] if self._peers is None else await pages_of(self._peers)

    async def __del__(self) -> None:
        if not hasattr(self, "_service"):  # it never started
            return
        if self._following is not None:
            self._following.cancel()
        # Serve waits for requests that are open; nobody need have one open for these.
        await self._service.background.finish()
        self._calls.close()
        self._tokens.close()
        for sender in (self._service.tracer, self._collected):
            if sender is not None:
                await asyncio.to_thread(sender.close)

    async def _wait_for_model(self) -> None:
        # The call stays pending until the first router replica has loaded its model.
        while self._service.model_info is None:
            try:
                status = await self._calls.status()
                self._service.model_info = msgspec.convert(status["model"], ModelInfo)
            except Exception as error:  # noqa: BLE001 (until one answers, the answer is 503)
                logger.warning("no instance answers yet: %s", error)
                await asyncio.sleep(1.0)


def deployment(config: TailserveConfig, router: Any) -> Any:
    """The Serve application node of `num_ingresses` ingresses in front of `router`."""
    node: Any = serve.deployment(
        Ingress,
        name="Ingress",
        num_replicas=config.num_ingresses,
        ray_actor_options={"num_cpus": config.resources.ingress_cpus},
        # Admission is the router's: every open stream is an ongoing request here.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=config.timeouts.drain_s,
        logging_config=logging_config(config.log_format),
    )
    return node.bind(config.model_dump(mode="json", exclude={"num_instances", "autoscaling"}), router)
