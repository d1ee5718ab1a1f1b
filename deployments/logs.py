"""Where tailserve's own log lines go inside Serve replicas."""

from __future__ import annotations

import logging


def log_with_serve() -> None:
    """Sends the lines of `tailserve` loggers wherever this replica's Serve logger writes, from INFO up."""
    own, serve = logging.getLogger("tailserve"), logging.getLogger("ray.serve")
    own.handlers = serve.handlers
    own.setLevel(logging.INFO)
    own.propagate = False
