"""The HTTP edge: its routes."""

from __future__ import annotations

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tailserve.deployments.http_answers import ERROR_HANDLERS, EventStreamResponse, read_body, respond
from tailserve.deployments.http_playground import playground_routes
from tailserve.deployments.http_responses import response_routes
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


def create_app(service: Service) -> Starlette:
    """The ASGI application over a service."""

    async def complete(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        tenant = service.gate.identify(request.headers)
        info = service.ready_info()
        body = parse_body(kind, await read_body(request), context=info.max_model_len)
        form, generation = await service.start(body, request.headers, tenant)
        if body.stream:
            return EventStreamResponse(event_stream(form, generation), generation)
        return respond(await whole_response(form, generation))

    async def chat(request: Request) -> Response:
        return await complete(request, ChatBody)

    async def completions(request: Request) -> Response:
        return await complete(request, CompletionBody)

    async def models(request: Request) -> Response:
        service.gate.identify(request.headers)
        return respond(service.models())

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        service.gate.identify(request.headers)
        entry = service.models()["data"][0]
        if name != entry["id"]:
            raise NotFoundError(f"the model {name!r} is not served here", param="model", code="model_not_found")
        return respond(entry)

    async def tokenize(request: Request) -> Response:
        service.gate.identify(request.headers)
        return respond(await service.tokenize(parse_body(TokenizeBody, await read_body(request))))

    async def detokenize(request: Request) -> Response:
        service.gate.identify(request.headers)
        info = service.ready_info()
        body = parse_body(DetokenizeBody, await read_body(request), context=info.max_model_len)
        return respond(await service.detokenize(body))

    async def abort_request(request: Request) -> Response:
        tenant = service.gate.identify(request.headers)
        await service.abort(parse_body(AbortBody, await read_body(request)).request_id, tenant)
        return respond({})

    async def delete_session(request: Request) -> Response:
        tenant = service.gate.identify(request.headers)
        return respond(await service.delete_session(request.path_params["session_id"], tenant))

    async def metrics(_: Request) -> Response:
        return Response("" if service.metrics is None else await service.metrics(), media_type=CONTENT_TYPE_LATEST)

    async def health(_: Request) -> Response:
        return respond({"status": "ok"})

    async def ready(_: Request) -> Response:
        return respond({"status": "ready", "model": msgspec.to_builtins(service.ready_info())})

    async def version(_: Request) -> Response:
        return respond(service.version())

    # In the order that they are looked through.
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/abort_request", abort_request, methods=["POST"]),
            Route("/v1/sessions/{session_id:path}", delete_session, methods=["DELETE"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
            Route("/version", version, methods=["GET"]),
            *response_routes(service),
            *playground_routes(service),
        ],
        exception_handlers=ERROR_HANDLERS,
    )
