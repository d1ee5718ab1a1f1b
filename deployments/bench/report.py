"""Samples to figures, a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailserve.deployments.bench.load import Sample
from tailserve.engine.errors import ConfigError

PERCENTILES = (50, 95, 99, 99.9)

METRICS: dict[str, Callable[[Sequence[Sample]], list[float]]] = {
    "TTFT": lambda samples: [s.ttft for s in samples],
    "TPOT": lambda samples: [s.tpot for s in samples if s.num_tokens > 1],
    "ITL": lambda samples: [gap for s in samples for gap in s.gaps],
}
"""Seconds: time to first token, time per output token of each request, and every gap between two pieces."""


def summarize(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Figures of a run of `seconds`: counts, tokens a second, percentiles in milliseconds. Failures count as such only."""
    good = [s for s in samples if s.error is None]
    tokens = sum(s.num_tokens for s in good)
    result: dict[str, Any] = {
        "requests": len(good),
        "failed": len(samples) - len(good),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }
    for name, values in METRICS.items():
        milliseconds = np.array(values(good) or [np.nan]) * 1e3
        result |= {f"{name}_p{p:g}_ms": float(np.percentile(milliseconds, p)) for p in PERCENTILES}
    return result


def attainment(samples: Sequence[Sample], *, ttft_s: float, tpot_s: float) -> float:
    """Share of requests, failed ones included, that met both targets."""
    met = sum(s.error is None and s.ttft <= ttft_s and s.tpot <= tpot_s for s in samples)
    return met / len(samples) if samples else float("nan")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; numbers with one decimal."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    heads = [column.removesuffix("_ms") for column in columns]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in [heads, *cells]
    )


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str("" if value is None else value)


def plot_tails(groups: Mapping[str, Sequence[Sample]], path: Path) -> None:
    """The distributions of TTFT and TPOT, a line for each group, p95, p99 and p999 marked, as PNG.

    ConfigError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'tailserve[bench]'", param="plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, name in zip(axes, ("TTFT", "TPOT"), strict=True):
        for group, samples in groups.items():
            values = np.sort(METRICS[name]([s for s in samples if s.error is None])) * 1e3
            if not len(values):
                continue
            # Distance from 1 on a logarithmic scale: the tail gets the room, not the middle.
            beyond = 1 - np.arange(len(values)) / len(values)
            (line,) = axis.plot(values, beyond, drawstyle="steps-post", label=group)
            for p in (95, 99, 99.9):
                at = np.percentile(values, p)
                axis.plot(at, 1 - p / 100, "o", color=line.get_color())
                axis.annotate(f"{at:.0f}", (at, 1 - p / 100), textcoords="offset points", xytext=(5, 3), fontsize=8)
        axis.set(xlabel=f"{name}, ms", yscale="log", ylim=(5e-4, 1), xlim=(0, None))
        axis.set_yticks([0.5, 0.05, 0.01, 0.001], ["p50", "p95", "p99", "p999"])
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
