"""The span of one HTTP request, by OpenTelemetry's GenAI conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tailserve.deployments.generation import Generation
from tailserve.deployments.openai import ChatBody, GenerationBody
from tailserve.engine.errors import TailserveError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from tailserve.deployments.tracing import Tracer


class RequestSpan:
    """Begins when a request is checked, and ends with its generation, or with what refused it."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._span = span
        self.traceparent = tracer.traceparent(span)
        """For the processes that work on it; empty where nobody keeps the trace."""

    def end(self, generation: Generation, response_id: str) -> None:
        """With what it cost."""
        usage: Any = generation.usage()
        firsts = [choice.ttft_s for choice in generation.choices if choice.ttft_s is not None]
        self._set(
            {
                "gen_ai.response.id": response_id,
                "gen_ai.response.finish_reasons": [choice.ended or "abort" for choice in generation.choices],
                "gen_ai.response.time_to_first_chunk": min(firsts) if firsts else None,
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
                "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "tailserve.accepted_draft_tokens": usage["completion_tokens_details"]["accepted_prediction_tokens"],
            }
        )
        if any(choice.ended == "error" for choice in generation.choices):
            self._set({"error.type": "internal_error"})
        self._span.end()

    def refuse(self, error: BaseException) -> None:
        """It was not let in."""
        self._set({"error.type": error.code if isinstance(error, TailserveError) else type(error).__name__})
        self._span.end()

    def _set(self, attributes: Mapping[str, Any]) -> None:
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})


def operation_of(body: GenerationBody) -> str:
    """What the conventions call it."""
    return "chat" if isinstance(body, ChatBody) else "text_completion"


def open_span(
    tracer: Tracer,
    headers: Mapping[str, str],
    body: GenerationBody,
    *,
    model: str,
    slo_class: str,
    session: str | None,
    age_s: float,
) -> RequestSpan:
    """Under the client's own trace, if it has one. No text is among the attributes. `age_s`: seconds since it arrived."""
    operation = operation_of(body)
    span = RequestSpan(tracer, tracer.begin(f"{operation} {model}", headers, age_s))
    span._set(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "tailserve",
            "gen_ai.conversation.id": session,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.max_tokens": body.wanted_tokens(),
            "gen_ai.request.temperature": body.temperature,
            "gen_ai.request.top_p": body.top_p,
            "gen_ai.request.stream": body.stream,
            "tailserve.slo_class": slo_class,
        }
    )
    return span
