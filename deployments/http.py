"""The HTTP edge: its routes."""

from __future__ import annotations

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from tailserve.deployments.http_answers import EventStreamResponse, answer_errors, read_body, respond
from tailserve.deployments.http_playground import add_playground
from tailserve.deployments.http_responses import add_response_routes
from tailserve.deployments.openai import (
    AbortBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_body,
)
from tailserve.deployments.responses import event_stream, whole_response
from tailserve.deployments.service import Service
from tailserve.engine.errors import NotFoundError


def create_app(service: Service) -> FastAPI:
    """The ASGI application over a service."""
    app = FastAPI(title="tailserve", docs_url=None, redoc_url=None, openapi_url=None)
    answer_errors(app)
    add_response_routes(app, service)
    add_playground(app, service)

    async def complete(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        tenant = service.gate.identify(request.headers)
        info = service.ready_info()
        body = parse_body(kind, await read_body(request), context=info.max_model_len)
        form, generation = await service.start(body, request.headers, tenant)
        if body.stream:
            return EventStreamResponse(event_stream(form, generation), generation)
        return respond(await whole_response(form, generation))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await complete(request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(request, CompletionBody)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.gate.identify(request.headers)
        return respond(service.models())

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        service.gate.identify(request.headers)
        entry = service.models()["data"][0]
        if name != entry["id"]:
            raise NotFoundError(f"the model {name!r} is not served here", param="model", code="model_not_found")
        return respond(entry)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        service.gate.identify(request.headers)
        return respond(await service.tokenize(parse_body(TokenizeBody, await read_body(request))))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        service.gate.identify(request.headers)
        info = service.ready_info()
        body = parse_body(DetokenizeBody, await read_body(request), context=info.max_model_len)
        return respond(await service.detokenize(body))

    @app.post("/abort_request")
    async def abort_request(request: Request) -> Response:
        tenant = service.gate.identify(request.headers)
        await service.abort(parse_body(AbortBody, await read_body(request)).request_id, tenant)
        return respond({})

    @app.delete("/v1/sessions/{session_id:path}")
    async def delete_session(session_id: str, request: Request) -> Response:
        return respond(await service.delete_session(session_id, service.gate.identify(request.headers)))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response("" if service.metrics is None else await service.metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> Response:
        return respond({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return respond({"status": "ready", "model": msgspec.to_builtins(service.ready_info())})

    @app.get("/version")
    async def version() -> Response:
        return respond(service.version())

    return app
