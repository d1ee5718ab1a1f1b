"""The playground: a web page on the server's own API."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from tailserve.deployments.http_answers import respond
from tailserve.deployments.service import Service

FOLDER = Path(__file__).parent / "playground"
HEADERS = {
    # Nothing from elsewhere, and nothing that an answer of the model brings along.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def playground_routes(service: Service) -> list[BaseRoute]:
    """`/` and what it loads. It has no rights of its own: with tenants it asks for an API key."""

    async def page(_: Request) -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    async def settings(_: Request) -> Response:
        config = service.config
        return respond(
            {
                "model": service.model,
                "classes": [slo.name for slo in config.classes()],
                "needs_key": service.gate.needs_key,
                # With several, who comes back may meet another one.
                "one_ingress": config.num_ingresses == 1,
            }
        )

    files = Mount("/playground", _Files(directory=FOLDER))
    return [Route("/", page), Route("/playground/settings", settings), files]


class _Files(StaticFiles):
    """With the page's own headers: what it loads must be of its version."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
