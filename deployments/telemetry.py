"""What tailserve counts, as metrics of Ray: each node exports them at its metrics port, as ray_tailserve_...

Names are those of vLLM where it has the same thing. Labels are bounded: the model, the class, and what Serve adds: the
application, the deployment and its replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve import metrics

from tailserve.deployments.generation import Choice
from tailserve.engine.errors import InvalidRequestError, QueueFullError, TailserveError
from tailserve.engine.stats import EngineGauges
from tailserve.engine.types import FinishReason, Request, SloClass

TTFT_S = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 8, 13, 21, 34, 60, 120]
TPOT_S = [0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2]


class RequestMetrics:
    """Of an ingress: how its requests went, as their users felt it."""

    def __init__(self, model: str, classes: Mapping[str, SloClass]) -> None:
        labels: Any = ("model_name", "slo_class")
        self._model, self._classes = model, classes
        self._attained = metrics.Counter(
            "tailserve_slo_attained", "Answers whose first token and pace met their class's targets", labels
        )
        self._missed = metrics.Counter("tailserve_slo_missed", "Answers that missed one of them, or failed", labels)
        self._refused = metrics.Counter(
            "tailserve_admission_rejections", "Requests that no instance took", (*labels, "reason")
        )
        self._ttft = metrics.Histogram(
            "tailserve_time_to_first_token_seconds", "From a request's arrival to its first token", TTFT_S, labels
        )
        self._tpot = metrics.Histogram(
            "tailserve_request_time_per_output_token_seconds", "Of an answer, behind its first token", TPOT_S, labels
        )

    def note_refusal(self, request: Request, error: TailserveError) -> None:
        """No instance took a request. Where that is no fault of its class being full, it missed its targets."""
        labels = self._labels(request.slo_class)
        self._refused.inc(1, labels | {"reason": error.code})
        if not isinstance(error, QueueFullError | InvalidRequestError):
            self._missed.inc(1, labels)

    def note(self, choice: Choice, reason: FinishReason) -> None:
        """A choice ended. One that its client gave up says nothing."""
        if reason is FinishReason.ABORT:
            return
        slo = self._classes[choice.request.slo_class]
        labels = self._labels(slo.name)
        ttft_s, in_time = choice.ttft_s, False
        if ttft_s is not None:
            self._ttft.observe(ttft_s, labels)
            self._tpot.observe(choice.tpot_s, labels)
            in_time = ttft_s <= slo.ttft_s and choice.tpot_s <= slo.tpot_s
        (self._attained if in_time and reason is not FinishReason.ERROR else self._missed).inc(1, labels)

    def _labels(self, slo_class: str) -> dict[str, str]:
        return {"model_name": self._model, "slo_class": slo_class}


class InstanceMetrics:
    """Of a router: how full its instance is."""

    def __init__(self, model: str) -> None:
        self._labels = {"model_name": model}
        self._running, self._waiting, self._kv, self._host_kv = (
            metrics.Gauge(f"tailserve_{name}", text, ("model_name",))
            for name, text in (
                ("num_requests_running", "Sequences that have a slot"),
                ("num_requests_waiting", "Sequences that wait for one"),
                ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1"),
                ("host_kv_cache_usage_perc", "The same of the second tier's"),
            )
        )

    def note(self, gauges: EngineGauges) -> None:
        """Takes the state of the moment."""
        self._running.set(gauges.num_running, self._labels)
        self._waiting.set(gauges.num_waiting, self._labels)
        self._kv.set(gauges.kv_cache_usage, self._labels)
        self._host_kv.set(gauges.host_kv_cache_usage, self._labels)
