"""Where tailserve's own log lines go inside Serve replicas."""

from __future__ import annotations

import logging
import logging.handlers
from typing import Any

from tailserve.cluster.config import LogFormat


def log_with_serve() -> None:
    """Sends the lines of `tailserve` loggers wherever this replica's Serve logger writes, from INFO up.

    Those of requests go to the replica's file alone: on a console there would be nothing else.
    """
    serve = logging.getLogger("ray.serve")
    files: list[logging.Handler] = [
        handler for handler in serve.handlers if isinstance(handler, logging.handlers.MemoryHandler)
    ]
    for name, handlers in (("tailserve", serve.handlers), ("tailserve.requests", files)):
        own = logging.getLogger(name)
        own.handlers = handlers
        own.setLevel(logging.INFO)
        own.propagate = False


def logging_config(log_format: LogFormat) -> dict[str, Any]:
    """A deployment's, as Serve takes it. Serve's own line for each call is off: streams are calls, too."""
    # What says nothing is as Serve's own variable says.
    return {"enable_access_log": False} | ({"encoding": "JSON"} if log_format == "json" else {})
