"""The HTTP edge: routes, and errors as OpenAI's clients expect them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from tailserve.deployments.generation import Generation
from tailserve.deployments.openai import (
    AbortBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_body,
)
from tailserve.deployments.responses import ResponseFormat, event_stream, whole_response
from tailserve.deployments.service import Service
from tailserve.engine.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    QueueFullError,
    TailserveError,
)

STATUS: list[tuple[type[TailserveError], int, str]] = [
    (BodyTooLargeError, 413, "invalid_request_error"),
    (InvalidRequestError, 400, "invalid_request_error"),
    (AuthenticationError, 401, "invalid_request_error"),
    (ForbiddenError, 403, "permission_error"),
    (NotFoundError, 404, "not_found_error"),
    (QueueFullError, 429, "rate_limit_error"),
    (NotReadyError, 503, "service_unavailable_error"),
    (TailserveError, 500, "server_error"),
]
"""Exception to HTTP status and OpenAI's error type; the first that fits."""
MAX_BODY_BYTES = 32 << 20


def create_app(service: Service) -> FastAPI:
    """The ASGI application over a service."""
    app = FastAPI(title="tailserve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(TailserveError, _on_tailserve_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(404, _on_http_error)
    app.add_exception_handler(405, _on_http_error)
    app.add_exception_handler(Exception, _on_accident)

    async def complete(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        tenant = service.gate.identify(request.headers)
        service.ready_info()
        body = parse_body(kind, await _body(request))
        form, generation = await service.start(body, request.headers, tenant)
        if body.stream:
            return EventStreamResponse(form, generation)
        return _respond(await whole_response(form, generation))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await complete(request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(request, CompletionBody)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.gate.identify(request.headers)
        return _respond(service.models())

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        service.gate.identify(request.headers)
        entry = service.models()["data"][0]
        if name != entry["id"]:
            raise NotFoundError(f"the model {name!r} is not served here", param="model", code="model_not_found")
        return _respond(entry)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        service.gate.identify(request.headers)
        return _respond(await service.tokenize(parse_body(TokenizeBody, await _body(request))))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        service.gate.identify(request.headers)
        return _respond(service.detokenize(parse_body(DetokenizeBody, await _body(request))))

    @app.post("/abort_request")
    async def abort_request(request: Request) -> Response:
        tenant = service.gate.identify(request.headers)
        await service.abort(parse_body(AbortBody, await _body(request)).request_id, tenant)
        return _respond({})

    @app.delete("/v1/sessions/{session_id:path}")
    async def delete_session(session_id: str, request: Request) -> Response:
        return _respond(await service.delete_session(session_id, service.gate.identify(request.headers)))

    @app.get("/health")
    async def health() -> Response:
        return _respond({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return _respond({"status": "ready", "model": msgspec.to_builtins(service.ready_info())})

    @app.get("/version")
    async def version() -> Response:
        return _respond(service.version())

    return app


class EventStreamResponse(StreamingResponse):
    """Server-sent events of a generation that ends when the response does, even if nothing of it was ever read."""

    def __init__(self, form: ResponseFormat, generation: Generation) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(event_stream(form, generation), media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


def _respond(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
    return bytes(data)


async def _on_tailserve_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TailserveError)
    status, kind = next((status, kind) for cls, status, kind in STATUS if isinstance(error, cls))
    headers = {}
    if isinstance(error, QueueFullError | NotReadyError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        # OpenAI's own clients read this one first.
        headers["Retry-After-Ms"] = str(math.ceil(1e3 * error.retry_after_s))
    return _error(status, error.message, kind, error.param, error.code, headers)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return _error(error.status_code, str(error.detail), "invalid_request_error", None, code, {})


async def _on_accident(_: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, so the server logs it.
    return _error(500, f"internal error: {type(error).__name__}", "server_error", None, "internal_error", {})


def _error(status: int, message: str, kind: str, param: str | None, code: str, headers: dict[str, str]) -> Response:
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)
