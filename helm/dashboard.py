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


def _ends(name: str) -> str:
    return f'sum by (slo_class) (rate(ray_tailserve_slo_{name}_total{{model_name=~"$model"}}[$__rate_interval]))'


# A counter is there once it has counted.
_ATTAINED = f"({_ends('attained')} or 0 * {_ends('missed')})"
_ENDED = f"({_ATTAINED} + ({_ends('missed')} or 0 * {_ends('attained')}))"
PANELS = [
    Panel(
        "Targets met",
        "percentunit",
        {"{{slo_class}}": f"{_ATTAINED} / {_ENDED}"},
    ),
    Panel("Answers a second", "reqps", {"{{slo_class}}": _ENDED}),
    Panel("Time to first token", "s", _tail("ray_tailserve_time_to_first_token_seconds")),
    Panel("Time per output token", "s", _tail("ray_tailserve_request_time_per_output_token_seconds")),
    Panel("Running sequences", "short", _gauge("num_requests_running")),
    Panel("Waiting sequences", "short", _gauge("num_requests_waiting")),
    Panel("KV blocks in use", "percentunit", _gauge("kv_cache_usage_perc")),
    Panel("Host KV blocks in use", "percentunit", _gauge("host_kv_cache_usage_perc")),
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
