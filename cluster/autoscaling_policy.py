"""Ray Serve's view of the autoscaling rule."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

# The module: Serve pickles this one by value.
from tailserve.cluster import autoscaling

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class InstancePolicy:
    """Serve calls it in every turn of its control loop, and adds the delays and bounds of its own `autoscaling_config`."""

    def __init__(self, utilization: float, least: int, least_by_class: dict[str, int], urgent: list[str]) -> None:
        """`urgent`: classes for which what was said last counts. Of all else the mean over Serve's look-back period does: a
        burst is over before an instance has started for it."""
        self._at_once = {f"{autoscaling.LATENESS}:{name}" for name in urgent}
        self._settings: dict[str, Any] = {"utilization": utilization, "least": least, "least_by_class": least_by_class}

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of instances, and no state."""
        reports: dict[str, dict[str, float]] = {}
        for metric, by_replica in (context.raw_metrics or {}).items():
            for replica, series in by_replica.items():
                if series:
                    values = [point.value for point in series]
                    said = values[-1] if metric in self._at_once else statistics.fmean(values)
                    reports.setdefault(str(replica), {})[metric] = said
        # One that has said nothing yet has nothing to do.
        heard = [one for one in reports.values() if autoscaling.SLOTS in one]
        idle = max(len(context.running_replicas) - len(heard), 0)
        reported = heard + [{}] * idle if heard else []
        return autoscaling.count_instances(reported, context.target_num_replicas, **self._settings), {}
