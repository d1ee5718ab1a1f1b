"""A line of log for each request, or for those that were late: which it was, and where its time went. No text."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from tailserve.cluster.config import Logged
from tailserve.deployments.generation import Choice
from tailserve.engine.errors import TailserveError
from tailserve.engine.types import FinishReason, Request

logger = logging.getLogger("tailserve.requests")


class RequestLog:
    """Fields go with each line as a record's `extra`, which is what a log of JSON shows."""

    def __init__(self, which: Logged) -> None:
        """`which`: missed has those that missed a target, or failed."""
        self._which = which

    def note(self, choice: Choice, reason: FinishReason, *, met: bool | None) -> None:
        """A choice ended. `met`: in time; None says nothing."""
        if not self._wants(met):
            return
        request = choice.request
        fields = _identity(request) | {
            "finish_reason": str(reason),
            "prompt_tokens": len(request.prompt_token_ids),
            "cached_tokens": choice.usage.cached_tokens,
            "output_tokens": choice.num_tokens,
        }
        if choice.ttft_s is not None:
            fields |= {"ttft_s": round(choice.ttft_s, 4), "tpot_s": round(choice.tpot_s, 5)}
        if choice.timeline is not None:
            fields |= {name: round(value, 4) for name, value in msgspec.structs.asdict(choice.timeline).items()}
        if met is not None:
            fields["slo_met"] = met
        ends = {FinishReason.ABORT: "left", FinishReason.ERROR: "failed"}
        _write(ends.get(reason, "answered" if met else "answered late"), fields)

    def note_refusal(self, request: Request, error: TailserveError, *, met: bool | None) -> None:
        """No instance took a request. `met`: see `note`."""
        if self._wants(met):
            _write("refused", _identity(request) | {"error": error.code})

    def _wants(self, met: bool | None) -> bool:
        return self._which == "all" or (self._which == "missed" and met is False)


def _identity(request: Request) -> dict[str, Any]:
    # Behind the client's part an id says which of its choices it is.
    name, _, choice = request.id.rsplit("/", 2)
    return {"client_request_id": name, "choice": int(choice), "slo_class": request.slo_class, "tenant": request.tenant}


def _write(what: str, fields: dict[str, Any]) -> None:
    # Of an id that a client chose, nothing can begin a line of its own.
    said = " ".join(f"{name}={value!r}" if isinstance(value, str) else f"{name}={value}" for name, value in fields.items())
    logger.info("%s: %s", what, said, extra=fields)
