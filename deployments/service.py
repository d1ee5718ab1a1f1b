"""What the HTTP routes do, without HTTP: from a checked body to a running generation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

import msgspec

from tailserve.cluster.config import TailserveConfig
from tailserve.cluster.early_stop import EarlyStopConfig
from tailserve.deployments.auth import Gate, Tenant
from tailserve.deployments.background import Background
from tailserve.deployments.client import RouterClient
from tailserve.deployments.conversations import Conversations
from tailserve.deployments.generation import Choice, Generation
from tailserve.deployments.headers import short_header, timeout_of
from tailserve.deployments.openai import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from tailserve.deployments.prompts import Prompts
from tailserve.deployments.public import PublicPrefixes
from tailserve.deployments.request_span import open_span, operation_of
from tailserve.deployments.responses import ResponseFormat
from tailserve.deployments.text import TextModel
from tailserve.deployments.tracing import Tracer
from tailserve.deployments.turns import Turns
from tailserve.engine.errors import InvalidRequestError, NotFoundError, NotReadyError
from tailserve.engine.sessions import belongs_to_session, sharing_scope
from tailserve.engine.types import FinishReason, ModelInfo, Request, SamplingParams

MAX_CHOICES = 128


class Service:
    """The API's logic. `model_info` is None while no instance has loaded the model."""

    def __init__(self, config: TailserveConfig, text: TextModel, client: RouterClient, model: str) -> None:
        self.config = config
        self._classes = {slo.name: slo for slo in config.classes()}
        self._early_stops = {slo.name: slo.early_stop for slo in config.slo_classes}
        self._text = text
        self._client = client
        self._running: dict[tuple[str, str], list[Generation]] = {}
        """Tenant and request id to what is under way."""
        self.conversations = Conversations()
        self.background = Background()
        self._turns = Turns()
        self._prompts = Prompts(text, self._turns)
        self._splits = text.reads_in_parts()
        self._public = PublicPrefixes(text, config.public_prefixes)
        self.note_end: Callable[[Choice, FinishReason], None] | None = None
        """See `Generation.on_end`."""
        self.note_gap: dict[str, Callable[[float], None]] = {}
        """Class to what is told of each pause between pieces."""
        self.tracer: Tracer | None = None
        self.metrics: Callable[[], Awaitable[str]] | None = None
        """Those of all processes, as a page of text."""
        self.gate = Gate(config.tenants, num_ingresses=config.num_ingresses)
        self.model = model
        self.model_info: ModelInfo | None = None

    def ready_info(self) -> ModelInfo:
        """The loaded model. NotReadyError before there is one."""
        if self.model_info is None:
            raise NotReadyError("the model is still loading; try again in a few seconds")
        return self.model_info

    async def start(
        self, body: ChatBody | CompletionBody, headers: Mapping[str, str], tenant: Tenant
    ) -> tuple[ResponseFormat, Generation]:
        """Places a request's sequences. Every way to refuse it raises before the first byte of an answer is sent."""
        leave = tenant.enter(body.n * (len(body.prompts()) if isinstance(body, CompletionBody) else 1))
        try:
            request_id, generation = await self._prepare(body, headers, tenant)
        except BaseException:
            leave()
            raise
        generation.on_close.append(leave)
        self.track(tenant, request_id, generation)
        name = f"{'chatcmpl' if isinstance(body, ChatBody) else 'cmpl'}-{request_id}"
        span = generation.span
        try:
            await generation.start()
        except BaseException as error:
            if span is not None:
                span.refuse(error)
            raise
        if span is not None:
            generation.on_close.append(lambda: span.end(generation, name))
        tier = self._tier(body, generation.choices[0].request.slo_class)
        return ResponseFormat(name, self.model, body, self._text, tier), generation

    async def _prepare(
        self, body: ChatBody | CompletionBody, headers: Mapping[str, str], tenant: Tenant
    ) -> tuple[str, Generation]:
        """A request's id, and its sequences, checked and not yet placed."""
        arrived = time.monotonic()
        info = self.ready_info()
        self._check_model(body.model)
        slo_class = tenant.choose_class(self._asked_class(body, headers), self.config.default_class)
        request_id = body.request_id or short_header(headers, "x-request-id", 128) or uuid.uuid4().hex
        session = body.session_id or short_header(headers, "x-session-id", 256)
        scope = sharing_scope(
            tenant=tenant.name,
            session_id=session,
            prompt_cache_key=body.prompt_cache_key,
            user=body.user,
            cache_salt=body.cache_salt,
        )
        text: str | None = None
        if isinstance(body, ChatBody):
            text, prompts = await self._prompts.of_chat(body, scope, info)
        else:
            prompts = await self._prompts.of_completion(body, info)
        choices = [prompt for prompt in prompts for _ in range(body.n)]
        if len(choices) > MAX_CHOICES:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with n={body.n} are {len(choices)} answers; at most {MAX_CHOICES} in one request",
                param="n",
            )
        timeout_s = timeout_of(headers)
        requests = []
        unique = uuid.uuid4().hex
        for index, prompt in enumerate(choices):
            sampling = self._sampling(body, prompt, info, slo_class)
            seed = (sampling.seed + index) % 2**64
            requests.append(
                Request(
                    id=f"{request_id}/{unique}/{index}",
                    prompt_token_ids=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=seed),
                    slo_class=slo_class,
                    tenant=tenant.name,
                    session_id=session,
                    num_public=self._public.count(prompt),
                    # The choices of one request share their prompt, whoever else may.
                    scope=scope or f"choices:{unique}",
                    age_s=time.monotonic() - arrived,
                    timeout_s=timeout_s,
                )
            )
        span = None
        if self.tracer is not None:
            # Last of all: what is refused before it has no span that somebody must end.
            age_s = time.monotonic() - arrived
            span = open_span(self.tracer, headers, body, model=self.model, slo_class=slo_class, session=session, age_s=age_s)
            requests = [msgspec.structs.replace(request, traceparent=span.traceparent) for request in requests]
        generation = Generation(
            self._client,
            self._text,
            requests,
            operation=operation_of(body),
            choices_per_prompt=body.n,
            stops=body.stops(),
            early_stop=self._early_stop(body, slo_class),
            show_logprobs=body.top_logprobs_count() is not None,
        )
        generation.on_end, generation.on_gap = self.note_end, self.note_gap.get(slo_class)
        generation.span = span
        if text is not None and scope is not None and self._splits:
            generation.on_complete = lambda choice: self._remember(scope, text, choice)
        return request_id, generation

    def _remember(self, scope: str, text: str, choice: Choice) -> None:
        answer = choice.token_ids[len(choice.request.prompt_token_ids) :]
        # Special tokens in it are not in its text.
        if self._text.decode(answer, skip_special_tokens=False) == choice.said:
            self._turns.keep(scope, text + choice.said, choice.token_ids)

    async def delete_session(self, session_id: str, tenant: Tenant) -> dict[str, Any]:
        """Frees what is kept of a tenant's session, wherever. Requests of it that run go on."""
        self._turns.drop_all(lambda scope: belongs_to_session(scope, tenant.name, session_id))
        self.conversations.drop_session(tenant.name, session_id)
        self.background.drop_session(tenant.name, session_id)
        count = await self._client.drop_session(tenant.name, session_id)
        return {"id": session_id, "object": "session", "deleted": True, "kv_blocks": count}

    async def abort(self, request_id: str, tenant: Tenant) -> None:
        """Ends a tenant's request by the id its client knows. NotFoundError if no such request of its own runs here."""
        # Clients know the id they gave, or the one in the response.
        names = [request_id, request_id.removeprefix("chatcmpl-"), request_id.removeprefix("cmpl-")]
        found = (self._running.get((tenant.name, name)) for name in names)
        running = next((generations for generations in found if generations), None)
        if running is None:
            raise NotFoundError(f"no request {request_id!r} is running here", param="request_id")
        for generation in running:
            generation.abort()

    def track(self, tenant: Tenant, name: str, generation: Generation) -> None:
        """Lets `abort` find a generation by a name, while it runs."""
        key = tenant.name, name
        self._running.setdefault(key, []).append(generation)

        def forget() -> None:
            self._running[key].remove(generation)
            if not self._running[key]:
                del self._running[key]

        generation.on_close.append(forget)

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        self._check_model(body.model)
        return await self._prompts.tokenize(body, self.ready_info())

    async def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        self._check_model(body.model)
        return await self._prompts.detokenize(body, self.ready_info())

    def models(self) -> dict[str, Any]:
        info = self.model_info
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "tailserve"}
        return {"object": "list", "data": [entry | ({"max_model_len": info.max_model_len} if info else {})]}

    @staticmethod
    def version() -> dict[str, str]:
        return {"version": version("tailserve")}

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.model:
            raise NotFoundError(
                f"the model {model!r} is not served here; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )

    def _asked_class(self, body: GenerationBody, headers: Mapping[str, str]) -> str | None:
        """Header, then tier, then priority; None for a request that leaves it to the server."""
        name = headers.get("x-slo-class")
        if name is not None:
            if name not in self._classes:
                raise InvalidRequestError(
                    f"X-SLO-Class is {name!r}; this server has {', '.join(self._classes)}", param="X-SLO-Class"
                )
            return name
        default = self.config.default_class
        if body.service_tier is not None:
            name = self.config.service_tiers.get(body.service_tier, default)
            # Where these mean the default they name no class: a tenant's own may be taken.
            return None if name == default and body.service_tier in ("auto", "default") else name
        if body.priority is not None and body.priority < 0:
            return self.config.urgent_class
        return None

    def _tier(self, body: GenerationBody, slo_class: str) -> str | None:
        """The tier that a request got, if it asked for one: a header or its tenant's tier may have said otherwise."""
        if body.service_tier is None:
            return None
        tiers = self.config.service_tiers
        named = (tier for tier in (body.service_tier, *tiers) if tier != "auto")
        return next((tier for tier in named if tiers.get(tier, self.config.default_class) == slo_class), "default")

    def _sampling(self, body: GenerationBody, prompt: tuple[int, ...], info: ModelInfo, slo_class: str) -> SamplingParams:
        early = self._early_stop(body, slo_class)
        wanted = body.wanted_tokens()
        limit = min(info.max_model_len - len(prompt), self._classes[slo_class].max_tokens)
        return body.sampling(
            max_tokens=limit if wanted is None else min(wanted, limit),
            eos_token_ids=self._text.eos_token_ids,
            vocab_size=info.vocab_size,
            watch_end=early is not None and early.complete_above is not None,
        )

    def _early_stop(self, body: GenerationBody, slo_class: str) -> EarlyStopConfig | None:
        config = self._early_stops[slo_class]
        return config if config.enabled and body.early_stop and not body.ignore_eos else None
