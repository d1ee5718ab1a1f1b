"""How many instances there should be, by what users feel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

LATE = 0.5
"""Of a class's time to first token: where one that comes now would wait for longer at every instance, there are too few."""
MOST_AT_ONCE = 2.0
"""How many times as many instances as run may be asked for because first tokens are late."""
SLACK = 0.8
"""One goes only where the others would be used less than this much of what is aimed at."""

SLOTS, KV = "slots", "kv"
LATENESS, OPEN = "lateness", "open"
"""What an instance reports, see `report`."""


class AutoscalingConfig(BaseModel):
    """How many instances there are, and when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_instances: int = Field(default=1, ge=1)
    max_instances: int = Field(ge=1)
    utilization: float = Field(default=0.7, gt=0, lt=1, description="of an instance's batch and KV blocks, what is aimed at")
    downscale_delay_s: float = Field(default=300.0, ge=0, description="how long fewer would have done before one goes")

    @model_validator(mode="after")
    def _check_order(self) -> AutoscalingConfig:
        if self.min_instances > self.max_instances:
            raise ValueError(f"min_instances is {self.min_instances}, above max_instances ({self.max_instances})")
        return self


def report(
    *, slots: float, kv: float, waits_s: Mapping[str, float], ttft_s: Mapping[str, float], num_open: Mapping[str, int]
) -> dict[str, float]:
    """What an instance says of itself, as flat numbers.

    slots: sequences that run or wait, as a share of those that keep their pace. kv: share of the blocks that running
    sequences hold. waits_s: class to seconds until the first token of a request that comes now; ttft_s: its target.
    num_open: class to requests that run or wait.
    """
    lateness = {f"{LATENESS}:{name}": waits_s.get(name, 0.0) / target for name, target in ttft_s.items()}
    return {SLOTS: slots, KV: kv} | lateness | {f"{OPEN}:{name}": float(count) for name, count in num_open.items()}


def count_instances(
    reports: Sequence[Mapping[str, float]],
    current: int,
    *,
    utilization: float,
    least: int,
    least_by_class: Mapping[str, int],
) -> int:
    """Instances that the load asks for.

    As many as hold what runs and waits with `utilization` of each in use. More where the next request's first token would
    come late wherever it went: that shows before any target is missed, since waiting is predicted. Fewer than `current` only
    where the rest would have room to spare, so that a load on the border does not go up and down. Never below `least`, nor
    below `least_by_class` of classes with open requests.

    reports: of the running instances; current: instances that run or start.
    """
    if not reports:
        return current
    used = sum(max(one.get(SLOTS, 0.0), one.get(KV, 0.0)) for one in reports)
    wanted = math.ceil(used / utilization - 1e-9)
    classes = {key.partition(":")[2] for one in reports for key in one if key.startswith(f"{LATENESS}:")}
    late = max((min(one.get(f"{LATENESS}:{name}", 0.0) for one in reports) for name in classes), default=0.0)
    if late > LATE:
        # By those that run: others may be starting already.
        wanted = max(wanted, math.ceil(len(reports) * min(late / LATE, MOST_AT_ONCE)))
    if wanted < current:
        wanted = min(current, math.ceil(used / (SLACK * utilization) - 1e-9))
    busy = {name for name in least_by_class if any(one.get(f"{OPEN}:{name}", 0.0) > 0 for one in reports)}
    return max(wanted, least, *(least_by_class[name] for name in busy))
