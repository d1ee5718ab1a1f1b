"""What the Responses API does: turns that go on from stored ones."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from tailserve.deployments.auth import Tenant
from tailserve.deployments.conversations import StoredResponse
from tailserve.deployments.headers import short_header
from tailserve.deployments.response_events import ResponseObject
from tailserve.deployments.responses_body import ResponsesBody
from tailserve.deployments.service import Service
from tailserve.engine.errors import InvalidRequestError


class Responder:
    """Runs each response as a chat with the whole conversation."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def start(self, body: ResponsesBody, headers: Mapping[str, str], tenant: Tenant) -> ResponseObject:
        """Places a response's sequence. Every way to refuse it raises before the first event.

        The turns of a conversation are one session, named by the first of them unless its client names it, or shares KV
        by a `prompt_cache_key`.
        """
        if body.background and not body.store:
            raise InvalidRequestError("background needs store: who comes back asks for what is stored", param="background")
        before = None
        if body.previous_response_id is not None:
            before = self._service.conversations.get(tenant.name, body.previous_response_id, "previous_response_id")
        session_id = body.session_id or short_header(headers, "x-session-id", 256)
        if session_id is None and before is not None:
            session_id = before.session_id
        elif session_id is None and body.store and body.prompt_cache_key is None:
            session_id = uuid.uuid4().hex
        history = () if before is None else before.messages
        form, generation = await self._service.start(body.as_chat(history, session_id), headers, tenant)
        # Never by a name that a client chose: whoever knows it may go on from it.
        response = ResponseObject(f"resp_{uuid.uuid4().hex}", body, form, session_id, generation)
        self._service.track(tenant, response.id, generation)
        if body.store:
            response.on_end = lambda: self._keep(tenant, response, (*history, *body.items()))
        return response

    def get(self, response_id: str, tenant: Tenant) -> dict[str, Any]:
        """A response in the background, or a stored one. NotFoundError if there is none (any more)."""
        entry = self._service.background.find(tenant.name, response_id)
        if entry is not None:
            return entry.response.data()
        response: dict[str, Any] = msgspec.json.decode(self._service.conversations.get(tenant.name, response_id).encoded)
        return response

    def delete(self, response_id: str, tenant: Tenant) -> dict[str, Any]:
        """Forgets a response, and ends it if it goes on; its session's KV blocks stay until they expire, or are deleted."""
        if self._service.background.find(tenant.name, response_id) is None:
            self._service.conversations.drop(tenant.name, response_id)
        else:
            self._service.background.drop(tenant.name, response_id)
            self._service.conversations.discard(tenant.name, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    def _keep(self, tenant: Tenant, response: ResponseObject, messages: tuple[dict[str, str], ...]) -> None:
        said = [{"role": "assistant", "content": response.text}] if response.text else []
        encoded = msgspec.json.encode(response.data())
        stored = StoredResponse(response.id, encoded, (*messages, *said), response.session_id)
        self._service.conversations.keep(tenant.name, stored)
