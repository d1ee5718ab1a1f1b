"""Answers over HTTP: JSON, server-sent events, and errors as OpenAI's clients expect them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tailserve.deployments.generation import Generation
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
MAX_BODY_BYTES = 8 << 20


EVENT_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event_stream_of(events: AsyncIterator[bytes]) -> Response:
    """Server-sent events of what does not end with its reader."""
    return StreamingResponse(events, media_type="text/event-stream", headers=EVENT_STREAM_HEADERS)


class EventStreamResponse(StreamingResponse):
    """Server-sent events of a generation that ends when the response does, even if nothing of it was ever read."""

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream", headers=EVENT_STREAM_HEADERS)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


def respond(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


async def read_body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
    return bytes(data)


async def _on_tailserve_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TailserveError)
    status, content = error_of(error)
    headers = {}
    if isinstance(error, QueueFullError | NotReadyError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        # OpenAI's own clients read this one first.
        headers["Retry-After-Ms"] = str(math.ceil(1e3 * error.retry_after_s))
    return JSONResponse({"error": content}, status, headers)


def error_of(error: TailserveError) -> tuple[int, dict[str, str | None]]:
    """Its HTTP status, and OpenAI's error object."""
    status, kind = next((status, kind) for cls, status, kind in STATUS if isinstance(error, cls))
    return status, {"message": error.message, "type": kind, "param": error.param, "code": error.code}


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return _error(error.status_code, str(error.detail), "invalid_request_error", code)


async def _on_accident(_: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, so the server logs it.
    return _error(500, f"internal error: {type(error).__name__}", "server_error", "internal_error")


def _error(status: int, message: str, kind: str, code: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


ERROR_HANDLERS: dict[Any, Any] = {
    TailserveError: _on_tailserve_error,
    HTTPException: _on_http_error,
    Exception: _on_accident,
}
"""All errors in one shape, as Starlette takes them."""
