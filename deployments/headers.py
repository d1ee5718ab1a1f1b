"""Request headers that are read by hand."""

from __future__ import annotations

from collections.abc import Mapping

from tailserve.engine.errors import InvalidRequestError

TIMEOUT_HEADER = "x-request-timeout-seconds"
EARLIER, MOST_EARLIER_S = 0.1, 0.2
"""Ray Serve knows the header as well, and cuts the connection when the time is over: the answer, with what there is of it,
must be out before. A share of the time, and seconds at most."""


def short_header(headers: Mapping[str, str], name: str, limit: int) -> str | None:
    """A header's value, if there is one: an empty one says nothing. InvalidRequestError if it is longer than `limit`."""
    value = headers.get(name) or None
    if value is not None and len(value) > limit:
        raise InvalidRequestError(f"{name} has {len(value)} characters, at most {limit} are allowed", param=name)
    return value


def timeout_of(headers: Mapping[str, str]) -> float | None:
    """Seconds until a request's answer is to end, if it says: a little before the time that it gives is over.

    InvalidRequestError for what is no positive number.
    """
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidRequestError(f"{TIMEOUT_HEADER} is {value!r}: give a positive number", param=TIMEOUT_HEADER)
    return seconds - min(EARLIER * seconds, MOST_EARLIER_S)
