"""Routes of the Responses API, over HTTP and over one WebSocket for a whole conversation."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tailserve.deployments.auth import Tenant
from tailserve.deployments.http_answers import (
    MAX_BODY_BYTES,
    EventStreamResponse,
    error_of,
    event_stream_of,
    read_body,
    respond,
)
from tailserve.deployments.openai import check_fields, parse_body, read_object
from tailserve.deployments.responder import Responder
from tailserve.deployments.response_events import ResponseObject, response_events, server_sent
from tailserve.deployments.responses_body import ResponsesBody
from tailserve.deployments.service import Service
from tailserve.engine.errors import InternalError, InvalidRequestError, TailserveError

logger = logging.getLogger(__name__)


def response_routes(service: Service) -> list[BaseRoute]:
    """`/v1/responses` and what belongs to it."""
    responder = Responder(service)

    async def create(request: Request) -> Response:
        tenant = service.gate.identify(request.headers)
        service.ready_info()
        body = parse_body(ResponsesBody, await read_body(request))
        response = await responder.start(body, request.headers, tenant)
        if body.background:
            log = service.background.run(tenant.name, response)
            return event_stream_of(log.read(-1)) if body.stream else respond(response.data())
        if body.stream:
            return EventStreamResponse(server_sent(response_events(response)), response.generation)
        async for _ in response_events(response):
            pass
        return respond(response.data(), 500 if response.status == "failed" else 200)

    async def get(request: Request) -> Response:
        response_id = request.path_params["response_id"]
        tenant = service.gate.identify(request.headers)
        # A HEAD must not wait for the end of what it does not send.
        if request.method == "HEAD" or request.query_params.get("stream", "").lower() in ("", "false", "0"):
            return respond(responder.get(response_id, tenant))
        after = _last_seen(request)
        return event_stream_of(service.background.log(tenant.name, response_id).read(after))

    async def delete(request: Request) -> Response:
        tenant = service.gate.identify(request.headers)
        return respond(responder.delete(request.path_params["response_id"], tenant))

    async def cancel(request: Request) -> Response:
        response_id = request.path_params["response_id"]
        await service.abort(response_id, service.gate.identify(request.headers))
        return respond({"id": response_id, "object": "response", "status": "cancelled"})

    async def converse(socket: WebSocket) -> None:
        await socket.accept()
        try:
            tenant = service.gate.identify(socket.headers)
        except TailserveError as error:
            await socket.send_text(msgspec.json.encode(_error_event(error)).decode())
            await socket.close(1008)
            return
        await Conversation(socket, service, responder, tenant).run()

    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/{response_id}", get, methods=["GET"]),
        Route("/v1/responses/{response_id}", delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", cancel, methods=["POST"]),
        WebSocketRoute("/v1/responses", converse),
    ]


class Conversation:
    """One WebSocket: `response.create` and `response.cancel` in, events out. One response at a time; it ends when the socket
    does."""

    def __init__(self, socket: WebSocket, service: Service, responder: Responder, tenant: Tenant) -> None:
        self._socket = socket
        self._service = service
        self._responder = responder
        self._tenant = tenant
        self._response: ResponseObject | None = None
        self._sending: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the client leaves."""
        try:
            while (message := await self._socket.receive())["type"] != "websocket.disconnect":
                try:
                    await self._take(message.get("text"))
                except TailserveError as error:
                    await self._tell(_error_event(error))
        finally:
            if self._response is not None:
                self._response.generation.close()
            if self._sending is not None:
                self._sending.cancel()

    async def _take(self, text: str | None) -> None:
        fields = _fields(text)
        kind = fields.pop("type", None)
        if kind == "response.cancel":
            if self._response is not None:
                self._response.generation.abort()
            return
        if kind != "response.create":
            raise InvalidRequestError(f"type is {kind!r}: send response.create or response.cancel", param="type")
        running = self._sending is not None and not self._sending.done()
        if running and self._response is not None and self._response.status == "in_progress":
            raise InvalidRequestError("a response is under way: wait for its end, or send response.cancel", param="type")
        if self._sending is not None:
            # Its last events may be on their way still.
            await self._sending
        self._service.ready_info()
        body = check_fields(ResponsesBody, fields)
        if body.background:
            raise InvalidRequestError("a response over a WebSocket ends with it: leave background out", param="background")
        self._response = await self._responder.start(body, self._socket.headers, self._tenant)
        self._sending = asyncio.create_task(self._send(self._response))

    async def _send(self, response: ResponseObject) -> None:
        try:
            async for event in response_events(response):
                await self._tell(event)
        except Exception as error:
            logger.exception("response %s failed", response.id)
            response.status = "failed"
            await self._tell(_error_event(InternalError(f"internal error: {type(error).__name__}")))
        finally:
            response.generation.close()

    async def _tell(self, event: dict[str, Any]) -> None:
        try:
            await self._socket.send_text(msgspec.json.encode(event).decode())
        except (WebSocketDisconnect, RuntimeError):
            # Starlette's words for a client that has left; `receive` says so, too.
            logger.debug("a client left before %s", event["type"])


def _last_seen(request: Request) -> int:
    """The number of the last event that a reader who comes back has seen; -1: none."""
    value, param = request.query_params.get("starting_after"), "starting_after"
    if value is None:
        value, param = request.headers.get("last-event-id", "-1"), "Last-Event-ID"
    try:
        return int(value)
    except ValueError:
        raise InvalidRequestError(f"{param} is {value!r}: give the number of an event", param=param) from None


def _fields(text: str | None) -> dict[str, Any]:
    if text is None:
        raise InvalidRequestError("the message is binary: send JSON as text", code="invalid_json")
    if len(text) > MAX_BODY_BYTES:
        raise InvalidRequestError(f"the message is larger than {MAX_BODY_BYTES >> 20} MiB")
    # Bodies of the HTTP API may be sent as they are; here every response is streamed.
    return {name: value for name, value in read_object(text).items() if name != "stream"}


def _error_event(error: TailserveError) -> dict[str, Any]:
    status, content = error_of(error)
    return {"type": "error", "status": status, "error": content}
