"""Request headers that are read by hand."""

from __future__ import annotations

from collections.abc import Mapping

from tailserve.engine.errors import InvalidRequestError


def short_header(headers: Mapping[str, str], name: str, limit: int) -> str | None:
    """A header's value, if there is one. InvalidRequestError if it is longer than `limit`."""
    value = headers.get(name)
    if value is not None and len(value) > limit:
        raise InvalidRequestError(f"{name} has {len(value)} characters, at most {limit} are allowed", param=name)
    return value


def timeout_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that a request may take, if it says. InvalidRequestError for what is no positive number."""
    value = headers.get("x-request-timeout-seconds")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidRequestError(
            f"x-request-timeout-seconds is {value!r}: give a positive number", param="x-request-timeout-seconds"
        )
    return seconds
