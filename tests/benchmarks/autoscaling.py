"""Autoscaling on simulated time: critical SLO attainment through a load step, by our policy and by Serve's default one.

Run: python tests/benchmarks/autoscaling.py [--start-s 60] [--json FILE]

Traffic and step costs are those of simulate.py. The load, in instances' worth of capacity, goes from 0.5 to 2.2 and back.
Both policies run through Ray Serve's own code for delays and bounds, every second, from 1 to 4 instances. Serve's default
counts ongoing requests; its target is what an instance holds at 70% of its capacity, as ours aims at 70% of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.serve.autoscaling_policy import _apply_autoscaling_config, default_autoscaling_policy
from ray.serve.config import AutoscalingConfig
from simulate import TRAFFIC, Arrival, Instance, capacity, read_traffic, simulate, traffic

from tailserve.cluster.autoscaling import report
from tailserve.cluster.autoscaling_policy import InstancePolicy
from tailserve.deployments.bench.report import table
from tailserve.engine.admission import Admission
from tailserve.engine.types import SloClass

PHASES = [(300.0, 0.5), (900.0, 2.2), (1500.0, 0.5)]
"""Seconds, and load in instances."""
MOST = 4
LOOK_BACK_S = 30
COLUMNS = ["policy", "class", "requests", "met_%", "met_step_%", "TTFT_p99_ms", "instances", "up_after_s", "at_end"]


class Fleet:
    """Instances that come `start_s` after they were asked for, and go when their last request has ended."""

    def __init__(self, settings: dict[str, Any], classes: dict[str, SloClass], start_s: float) -> None:
        self._settings, self._classes, self._start_s = settings, classes, start_s
        self.running = [self._instance(0)]
        self._leaving: list[Instance] = []
        self._due: list[float] = []
        self.target = 1
        self.used_s = 0.0
        self._admissions: dict[int, Admission] = {}
        self._said: dict[int, deque[dict[str, float]]] = {}

    def _instance(self, seed: int) -> Instance:
        return Instance(self._settings, tuple(self._classes.values()), "slack", seed)

    def scale(self, target: int, now: float) -> None:
        self.target = target
        self._due += [now + self._start_s] * (target - len(self.running) - len(self._due))
        del self._due[max(target - len(self.running), 0) :]
        while len(self.running) > target:
            self._leaving.append(self.running.pop())

    def run_until(self, now: float, seconds: float) -> None:
        for due in [due for due in self._due if due <= now]:
            self._due.remove(due)
            self.running.append(self._instance(len(self.running)))
            self.running[-1].clock.now = now
        for instance in self.running + self._leaving:
            instance.run_until(now)
        self._leaving = [instance for instance in self._leaving if instance.open]
        self.used_s += seconds * (len(self.running) + len(self._due) + len(self._leaving))

    def metrics(self) -> dict[str, dict[str, list[Any]]]:
        """What each running instance reported lately, as Serve hands it over."""
        found: dict[str, dict[str, list[Any]]] = {}
        for number, instance in enumerate(self.running):
            engine, now = instance.engine, instance.clock.now
            admission = self._admissions.setdefault(id(instance), Admission(tuple(self._classes.values())))
            admission.note(engine.load(), now)
            gauges, demand = engine.gauges(), engine.demand()
            said = report(
                slots=demand.slots,
                kv=gauges.kv_cache_usage,
                waits_s=admission.state(gauges.num_waiting, now).waits_s,
                ttft_s={name: slo.ttft_s for name, slo in self._classes.items()},
                num_open=demand.num_open,
            )
            past = self._said.setdefault(id(instance), deque(maxlen=LOOK_BACK_S))
            past.append(said)
            for name in said:
                found.setdefault(name, {})[str(number)] = [SimpleNamespace(value=one[name]) for one in past if name in one]
        return found


def run(
    settings: dict[str, Any], classes: dict[str, SloClass], arrivals: list[Arrival], policy: Any, config: Any, start_s: float
) -> dict[str, Any]:
    """A trace under a policy: what was used, and when the third instance ran."""
    fleet, state, waiting = Fleet(settings, classes, start_s), {}, deque(arrivals)
    ongoing: deque[int] = deque(maxlen=LOOK_BACK_S)
    third, end = None, sum(seconds for seconds, _ in PHASES)
    for second in range(int(end)):
        while waiting and waiting[0].at < second + 1:
            arrival = waiting.popleft()
            for instance in fleet.running:
                instance.run_until(arrival.at)
            min(fleet.running, key=lambda instance: len(instance.open)).add(arrival)
        now = second + 1.0
        fleet.run_until(now, 1.0)
        ongoing.append(sum(len(instance.open) for instance in fleet.running))
        context = SimpleNamespace(
            current_num_replicas=len(fleet.running),
            target_num_replicas=fleet.target,
            running_replicas=[str(number) for number in range(len(fleet.running))],
            total_num_requests=statistics.mean(ongoing),
            raw_metrics=fleet.metrics(),
            policy_state=state,
            config=config,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=MOST,
        )
        with_clock(now)
        wanted, state = policy(context)
        fleet.scale(min(max(int(wanted), 1), MOST), now)
        if third is None and now >= PHASES[0][0] and len(fleet.running) >= 3:
            third = now - PHASES[0][0]
    fleet.run_until(end + 600, 0.0)
    return {"instances": fleet.used_s / end, "up_after_s": third or float("nan"), "at_end": len(fleet.running)}


def with_clock(now: float) -> None:
    """Serve's delays go by the wall clock."""
    import ray.serve.autoscaling_policy as module

    module.time = SimpleNamespace(time=lambda: now)  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-s", type=float, default=60.0, help="from the decision until an instance serves")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings, classes = read_traffic(TRAFFIC)
    able = capacity(settings, classes)
    sample = list(traffic(settings, classes, 0.7 * able, 600.0))
    simulate(settings, classes, "slack", sample, 1)
    held = sum(arrival.last - arrival.at for arrival in sample) / 600.0
    print(f"capacity of an instance: {able:.2f} requests/s; it holds {held:.0f} requests at 70% of it")
    common = {"min_replicas": 1, "max_replicas": MOST, "downscale_delay_s": 300.0}
    default = AutoscalingConfig(**common, target_ongoing_requests=max(held, 1.0))
    prompt = AutoscalingConfig(**common, target_ongoing_requests=max(held, 1.0), upscale_delay_s=0.0)
    ours = AutoscalingConfig(**common, upscale_delay_s=0.0)
    policies = {
        "tailserve": (_apply_autoscaling_config(InstancePolicy(0.7, 1, {}, ["critical"])), ours),
        "default": (_apply_autoscaling_config(default_autoscaling_policy), default),
        "default, no delay up": (_apply_autoscaling_config(default_autoscaling_policy), prompt),
    }
    rows = []
    for name, (policy, config) in policies.items():
        arrivals, begin = [], 0.0
        for number, (seconds, load) in enumerate(PHASES):
            part = list(traffic(settings | {"seed": settings["seed"] + number}, classes, load * able, seconds))
            for arrival in part:
                arrival.at += begin
            arrivals += part
            begin += seconds
        used = run(settings, classes, arrivals, policy, config, args.start_s)
        for slo_class in classes:
            own = [arrival for arrival in arrivals if arrival.slo.name == slo_class]
            step = [arrival for arrival in own if PHASES[0][0] <= arrival.at < PHASES[0][0] + 300]
            ttft = sorted(arrival.ttft if arrival.first else float("inf") for arrival in own)
            row = {"policy": name, "class": slo_class, "requests": len(own)}
            row |= {"met_%": 100 * statistics.mean(a.met and a.first > 0 for a in own)}
            row |= {"met_step_%": 100 * statistics.mean(a.met and a.first > 0 for a in step)}
            rows.append(row | {"TTFT_p99_ms": 1e3 * ttft[int(0.99 * len(ttft))]} | used)
        print(table(rows[-len(classes) :], COLUMNS), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"capacity": able, "held": held, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
