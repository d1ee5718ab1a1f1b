"""The Grafana dashboard that the chart ships, as data."""

from __future__ import annotations

from typing import Any, NamedTuple


class Panel(NamedTuple):
    title: str
    unit: str
    queries: dict[str, str]
    """Legend to PromQL."""


def _quantile(metric: str, share: float) -> str:
    buckets = f'{metric}_bucket{{model_name=~"$model"}}[$__rate_interval]'
    return f"histogram_quantile({share}, sum by (le, slo_class) (rate({buckets})))"


def _tail(metric: str) -> dict[str, str]:
    return {
        f"p{name} {{{{slo_class}}}}": _quantile(metric, share) for name, share in (("50", 0.5), ("99", 0.99), ("999", 0.999))
    }


def _gauge(name: str) -> dict[str, str]:
    return {"{{replica}}": f'ray_tailserve_{name}{{model_name=~"$model"}}'}


def _by_class(name: str) -> dict[str, str]:
    return {"{{slo_class}}": f'sum by (slo_class) (ray_tailserve_{name}{{model_name=~"$model"}})'}


def _rate(name: str, *labels: str) -> str:
    of = f'rate(ray_tailserve_{name}_total{{model_name=~"$model"}}[$__rate_interval])'
    return f"sum by ({', '.join(labels)}) ({of})" if labels else f"sum({of})"


def _part(name: str) -> str:
    return _quantile(f"ray_tailserve_request_{name}_time_seconds", 0.99)


# A counter is there once it has counted.
_ATTAINED = f"({_rate('slo_attained', 'slo_class')} or 0 * {_rate('slo_missed', 'slo_class')})"
_ENDED = f"({_ATTAINED} + ({_rate('slo_missed', 'slo_class')} or 0 * {_rate('slo_attained', 'slo_class')}))"
PANELS = [
    Panel(
        "Targets met",
        "percentunit",
        {"{{slo_class}}": f"{_ATTAINED} / {_ENDED}"},
    ),
    Panel("Answers a second", "reqps", {"{{slo_class}}": _ENDED}),
    Panel("Time to first token", "s", _tail("ray_tailserve_time_to_first_token_seconds")),
    Panel("Time per output token", "s", _tail("ray_tailserve_request_time_per_output_token_seconds")),
    Panel(
        "Where the time goes, p99",
        "s",
        {f"{name} {{{{slo_class}}}}": _part(name) for name in ("queue", "prefill", "decode")},
    ),
    Panel(
        "Tokens a second",
        "short",
        {"read": _rate("prompt_tokens"), "generated": _rate("generation_tokens")},
    ),
    Panel("Running sequences", "short", _by_class("num_requests_running")),
    Panel("Waiting sequences", "short", _by_class("num_requests_waiting")),
    Panel("Sequences that keep the pace", "short", _by_class("batch_cap")),
    Panel("Sequences displaced a second", "short", {"displaced": _rate("num_preemptions")}),
    Panel("KV blocks in use", "percentunit", _gauge("kv_cache_usage_perc")),
    Panel("Host KV blocks in use", "percentunit", _gauge("host_kv_cache_usage_perc")),
    Panel(
        "Prompt tokens found in the cache",
        "percentunit",
        {"found": f"{_rate('prefix_cache_hits')} / {_rate('prefix_cache_queries')}"},
    ),
    Panel(
        "Draft tokens that held",
        "percentunit",
        {"all": f"{_rate('spec_decode_num_accepted_tokens')} / {_rate('spec_decode_num_draft_tokens')}"}
        | {
            "place {{position}}": f"{_rate('spec_decode_num_accepted_tokens_per_pos', 'position')}"
            f" / on () group_left () {_rate('spec_decode_num_drafts')}"
        },
    ),
    Panel("How answers end", "reqps", {"{{finished_reason}}": _rate("request_success", "finished_reason")}),
    Panel("Refusals a second", "reqps", {"{{slo_class}} {{reason}}": _rate("admission_rejections", "slo_class", "reason")}),
    Panel("The verifier works", "percentunit", {"{{replica}}": _rate("verifier_seconds", "replica")}),
    # No rate: a counter that begins with its first count has none then.
    Panel("Verifiers started anew", "short", {"{{replica}}": 'ray_tailserve_executor_restarts_total{model_name=~"$model"}'}),
]


def dashboard() -> dict[str, Any]:
    """As Grafana imports it; two panels in a row."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "title": "tailserve",
        "uid": "tailserve",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model",
                    "type": "query",
                    "datasource": source,
                    "query": "label_values(ray_tailserve_num_requests_running, model_name)",
                    "refresh": 2,
                    "includeAll": True,
                    "allValue": ".*",
                },
            ]
        },
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(ord("A") + place), "expr": expression, "legendFormat": legend, "datasource": source}
                    for place, (legend, expression) in enumerate(panel.queries.items())
                ],
            }
            for number, panel in enumerate(PANELS)
        ],
    }
