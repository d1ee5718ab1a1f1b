"""As much of a Kubernetes API server as helm needs, which takes nothing that its schemas refuse.

It knows no admission, no controllers and no watches. Field ownership of server-side apply is that of one manager: what
the last apply no longer names is removed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import yaml
from secret_protobuf import from_protobuf, to_protobuf

KINDS = {
    "v1": ("Pod", "Secret", "ConfigMap", "Service", "ServiceAccount", "PersistentVolumeClaim"),
    "batch/v1": ("Job",),
    "policy/v1": ("PodDisruptionBudget",),
    "networking.k8s.io/v1": ("NetworkPolicy", "Ingress"),
    "scheduling.k8s.io/v1": ("PriorityClass",),
    "rbac.authorization.k8s.io/v1": ("Role", "RoleBinding"),
    "ray.io/v1": ("RayService",),
    "monitoring.coreos.com/v1": ("PodMonitor", "PrometheusRule"),
    "gateway.networking.k8s.io/v1": ("HTTPRoute",),
}
CLUSTER_WIDE = {"PriorityClass"}
PLURALS = {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses", "PriorityClass": "priorityclasses"}
PROTOBUF = "application/vnd.kubernetes.protobuf"

Object = dict[str, Any]


class Place(NamedTuple):
    """Where an object, or (without a name) all of a kind are."""

    version: str
    kind: str
    namespace: str
    name: str


class Refused(Exception):
    """A status that is not a success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason

    @property
    def status(self) -> Object:
        return {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": str(self), "reason": self.reason, "code": self.code,
        }  # fmt: skip


class KubernetesApi:
    """What is stored, and the verbs."""

    def __init__(self, complaints: Callable[[Object], list[str]]) -> None:
        """`complaints`: what is wrong with an object, in words."""
        self.objects: dict[Place, Object] = {}
        self._complaints = complaints
        self._version = 0
        self._lock = threading.Lock()

    def do(self, verb: str, place: Place, body: Object | None, patch: str = "") -> Object:
        """Raises Refused."""
        with self._lock:
            if verb == "POST":
                return self._create(place, body or {})
            if verb == "PATCH" and patch == "application/apply-patch+yaml" and place not in self.objects:
                return self._create(place, body or {})
            if place not in self.objects:
                raise Refused(404, "NotFound", f"{place.kind} {place.name!r} not found")
            before = self.objects[place]
            match verb:
                case "DELETE":
                    return self.objects.pop(place)
                case "PUT":
                    return self._store(place, body or {}, before)
                case "PATCH":
                    applied = patch == "application/apply-patch+yaml"
                    return self._store(place, body or {} if applied else merged(before, body or {}), before)
            return before

    def list(self, place: Place, selector: str) -> Object:
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        with self._lock:
            found = [
                thing for own, thing in self.objects.items()
                if own[:2] == place[:2] and place.namespace in ("", own.namespace)
                and wanted.items() <= thing["metadata"].get("labels", {}).items()
            ]  # fmt: skip
        return {"apiVersion": place.version, "kind": f"{place.kind}List", "metadata": {}, "items": found}

    def _create(self, place: Place, body: Object) -> Object:
        place = place._replace(name=body["metadata"]["name"])
        if place in self.objects:
            raise Refused(409, "AlreadyExists", f"{place.kind} {place.name!r} already exists")
        return self._store(place, body, None)

    def _store(self, place: Place, body: Object, before: Object | None) -> Object:
        wrong = self._complaints(body)
        if wrong:
            raise Refused(422, "Invalid", f"{place.kind} {place.name!r}: {'; '.join(wrong)}")
        self._version += 1
        own = {"uid": before["metadata"]["uid"] if before else str(uuid.uuid4()), "resourceVersion": str(self._version)}
        namespace = {} if place.kind in CLUSTER_WIDE else {"namespace": place.namespace}
        own |= {"creationTimestamp": "2026-01-01T00:00:00Z"} | namespace
        self.objects[place] = body | {"metadata": body["metadata"] | own}
        return self.objects[place]


def merged(before: Any, patch: Any) -> Any:
    """RFC 7386; lists of things with names are merged by these, as by strategic patches."""
    if isinstance(patch, dict):
        base = before if isinstance(before, dict) else {}
        plain = {key: value for key, value in patch.items() if not key.startswith("$")}
        kept = {key: value for key, value in base.items() if plain.get(key, value) is not None}
        return kept | {key: merged(base.get(key), value) for key, value in plain.items() if value is not None}
    if isinstance(patch, list) and patch and all(isinstance(entry, dict) and "name" in entry for entry in patch):
        named = {entry["name"]: entry for entry in before or []}
        gone = {entry["name"] for entry in patch if entry.get("$patch") == "delete"}
        named |= {entry["name"]: merged(named.get(entry["name"]), entry) for entry in patch}
        return [entry for name, entry in named.items() if name not in gone]
    return patch


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: KubernetesApi

    def _answer(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        try:
            self._send(200, discovery(url.path) or self._objects(url.path, parse_qs(url.query), raw))
        except Refused as refused:
            self._send(refused.code, refused.status)

    def _objects(self, path: str, query: dict[str, list[str]], raw: bytes) -> Object:
        place = place_of(path)
        content = (self.headers.get("Content-Type") or "").split(";")[0]
        body = None
        if raw and self.command != "DELETE":
            body = from_protobuf(raw) if content == PROTOBUF else yaml.safe_load(raw)
        if self.command == "GET" and not place.name:
            return self.api.list(place, ",".join(query.get("labelSelector", [])))
        return self.api.do(self.command, place, body, content)

    def _send(self, code: int, answer: Object) -> None:
        binary = PROTOBUF in (self.headers.get("Accept") or "") and answer.get("kind") in ("Secret", "SecretList")
        data = to_protobuf(answer) if binary else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", PROTOBUF if binary else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: what helm has to say of an answer is enough."""


@contextlib.contextmanager
def serve(api: KubernetesApi) -> Iterator[str]:
    """Its address, for as long as it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def plural(kind: str) -> str:
    return PLURALS.get(kind, f"{kind.lower()}s")


def place_of(path: str) -> Place:
    """Raises Refused for what is not known."""
    parts = path.strip("/").split("/")
    version = "/".join(parts[1:2] if parts[0] == "api" else parts[1:3])
    rest = parts[2 if parts[0] == "api" else 3 :]
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    for kind in KINDS.get(version, ()):
        if rest and plural(kind) == rest[0]:
            return Place(version, kind, namespace, rest[1] if len(rest) > 1 else "")
    raise Refused(404, "NotFound", f"the server could not find the requested resource: {path}")


def discovery(path: str) -> Object | None:
    match path.strip("/").split("/"):
        case ["version"]:
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            versions = [{"groupVersion": version, "version": "v1"} for version in KINDS if "/" in version]
            listed = [{"name": own["groupVersion"][:-3], "versions": [own], "preferredVersion": own} for own in versions]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        case ["api", version] | ["apis", *_, version] if (path.strip("/").split("/", 1)[1]) in KINDS:
            group = path.strip("/").split("/", 1)[1]
            same = {"singularName": "", "verbs": ["create", "delete", "get", "list", "patch", "update"]}
            resources = [
                {"name": plural(kind), "namespaced": kind not in CLUSTER_WIDE, "kind": kind} | same for kind in KINDS[group]
            ]
            return {"kind": "APIResourceList", "apiVersion": version, "groupVersion": group, "resources": resources}
    return None
