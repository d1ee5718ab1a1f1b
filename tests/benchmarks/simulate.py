"""Scheduling policies on simulated time: the engine as it is, over an executor that only says how long a step takes.

Run: python tests/benchmarks/simulate.py [--minutes 60] [--instances 2] [--load 0.5 0.9 1.5] [--policies slack priority fcfs]
     [--traffic FILE] [--json FILE]

Capacity is what first come first served completes when it is never idle, in the same run. Traffic and the step's costs
(those of a large model on several GPUs) are in traffic.json. Prints a line for each policy, load and class, and writes JSON
with --json FILE. Goodput is requests a second that met both targets of their class.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fakes import StepClock, make_request

from tailserve.deployments.bench.report import table
from tailserve.deployments.collector import keep_collector_out_of_steps
from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import CONTEXT, count_excess, count_tokens
from tailserve.engine.engine import Engine
from tailserve.engine.types import Batch, ProfiledStep, SloClass, StepResult, TokenChunk

TRAFFIC = Path(__file__).with_name("traffic.json")
COLUMNS = ["policy", "load", "class", "requests", "met_%", "goodput", "TTFT_p50_ms", "TTFT_p99_ms", "TPOT_p50_ms"]
COLUMNS += ["TPOT_p99_ms", "oldest_wait_s", "tokens_per_s"]


@dataclass
class Arrival:
    """A request of the trace, and what became of it. Seconds of simulated time."""

    at: float
    slo: SloClass
    num_prompt: int
    num_output: int
    tenant: str = ""
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.first - self.at

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(self.num_tokens - 1, 1)

    @property
    def met(self) -> bool:
        return self.ttft <= self.slo.ttft_s and self.tpot <= self.slo.tpot_s


class SimulatedExecutor:
    """Steps that take time on a clock of their own, and make tokens of no meaning."""

    lost = False

    def __init__(self, costs: dict[str, float], chance: random.Random) -> None:
        self._costs = costs
        self._chance = chance
        self._steps: deque[Batch] = deque()
        self.clock = StepClock()

    def submit(self, batch: Batch) -> None:
        costs = self._costs
        context = count_excess(batch) + CONTEXT * len(batch.rows)
        seconds = costs["base_s"] + costs["token_s"] * count_tokens(batch) + costs["context_s"] * context
        seconds = (seconds + costs["sequence_s"] * sum(batch.samples)) * self._chance.lognormvariate(0, costs["noise"])
        self.clock.begin(seconds if batch.rows else 1e-4)
        self._steps.append(batch)

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        seconds = self.clock.wait(timeout_s)
        if seconds is None:
            return None
        batch = self._steps.popleft()
        return StepResult(batch.step, [[7] if samples else [] for samples in batch.samples], {}, seconds)

    def restart(self) -> None:
        raise NotImplementedError


class Instance:
    """An engine on simulated time."""

    def __init__(self, settings: dict[str, Any], classes: tuple[SloClass, ...], policy: str, seed: int) -> None:
        costs = settings["step"]
        self.executor = SimulatedExecutor(costs, random.Random(seed))
        token_s, logits_s = costs["token_s"], costs["sequence_s"]
        profile = [ProfiledStep(n, costs["base_s"] + (token_s + logits_s) * n) for n in (1, 8, 64, 256)]
        profile.append(ProfiledStep(64, profile[2].seconds - 63 * logits_s, 63))
        profile.append(ProfiledStep(8, profile[1].seconds + 8192 * costs["context_s"], 0, 8192))
        config = EngineConfig(
            classes=classes,
            scheduling_policy=policy,
            step_profile=tuple(profile),
            enable_prefix_caching=False,
            **settings["engine"],
        )
        self.clock = self.executor.clock
        self.engine = Engine(config, self.executor, clock=lambda: self.clock.now)
        self.open: dict[str, Arrival] = {}
        self.oldest_wait: dict[str, float] = {}

    def run_until(self, moment: float) -> None:
        """Steps until then, or until there is nothing to do."""
        while self.clock.now < moment and self.engine.has_work:
            for chunk in self.engine.step():
                self._take(chunk)
        self.clock.now = max(self.clock.now, moment if not self.engine.has_work else 0.0)

    def add(self, arrival: Arrival) -> None:
        request = make_request(
            [1] * arrival.num_prompt,
            max_tokens=arrival.num_output,
            slo_class=arrival.slo.name,
            tenant=arrival.tenant,
            age_s=max(self.clock.now - arrival.at, 0.0),
        )
        self.open[request.id] = arrival
        self.engine.add(request)

    def _take(self, chunk: TokenChunk) -> None:
        arrival = self.open[chunk.request_id]
        now = self.clock.now
        if chunk.token_ids:
            waited = now - (arrival.last or arrival.at)
            self.oldest_wait[arrival.slo.name] = max(self.oldest_wait.get(arrival.slo.name, 0.0), waited)
            arrival.first = arrival.first or now
            arrival.last = now
            arrival.num_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            del self.open[chunk.request_id]


def read_traffic(path: Path) -> tuple[dict[str, Any], dict[str, SloClass]]:
    """The file's settings, and its classes by name."""
    settings = json.loads(path.read_text())
    targets = ("priority", "ttft_s", "tpot_s")
    classes = {
        name: SloClass(name=name, speculation="off", **{target: kind[target] for target in targets})
        for name, kind in settings["classes"].items()
    }
    return settings, classes


def traffic(settings: dict[str, Any], classes: dict[str, SloClass], rate: float, seconds: float) -> Iterator[Arrival]:
    """Arrivals of all classes, in order."""
    chance = random.Random(settings["seed"])
    shape = settings["arrival_cv"] ** -2

    def length(median: float, sigma: float, least: int, most: int) -> int:
        return int(min(max(chance.lognormvariate(0, sigma) * median, least), most))

    def of(name: str) -> Iterator[Arrival]:
        kind, at = settings["classes"][name], 0.0
        scale = 1 / (rate * kind["share"]) / shape
        while (at := at + chance.gammavariate(shape, scale)) < seconds:
            yield Arrival(at, classes[name], length(*kind["prompt"]), length(*kind["output"]))

    return heapq.merge(*(list(of(name)) for name in classes), key=lambda arrival: arrival.at)


def simulate(
    settings: dict[str, Any], classes: dict[str, SloClass], policy: str, arrivals: list[Arrival], count: int
) -> list[Instance]:
    """Runs a trace to its end over `count` instances, each request at the one with the fewest. Returns the instances."""
    instances = [Instance(settings, tuple(classes.values()), policy, seed) for seed in range(count)]
    for arrival in arrivals:
        for instance in instances:
            instance.run_until(arrival.at)
        min(instances, key=lambda instance: len(instance.open)).add(arrival)
    for instance in instances:
        instance.run_until(float("inf"))
    return instances


def capacity(settings: dict[str, Any], classes: dict[str, SloClass]) -> float:
    """Requests a second that an instance completes when it is never idle."""
    arrivals = list(traffic(settings, classes, 1.0, 3000.0))
    for arrival in arrivals:
        arrival.at = 0.0
    simulate(settings, classes, "fcfs", arrivals, 1)
    # The beginning and the end, with fewer sequences, do not count.
    ends = sorted(arrival.last for arrival in arrivals)
    low, high = len(ends) // 5, 4 * len(ends) // 5
    return (high - low) / (ends[high] - ends[low])


def figures(arrivals: list[Arrival], seconds: float) -> dict[str, float]:
    """Of one class."""

    def at(values: list[float], share: float) -> float:
        return 1e3 * sorted(values)[min(int(share * len(values)), len(values) - 1)]

    met = sum(arrival.met for arrival in arrivals)
    ttft, tpot = [a.ttft for a in arrivals], [a.tpot for a in arrivals]
    return {
        "requests": len(arrivals),
        "met_%": 100 * met / len(arrivals),
        "goodput": met / seconds,
        "TTFT_p50_ms": at(ttft, 0.5),
        "TTFT_p99_ms": at(ttft, 0.99),
        "TPOT_p50_ms": at(tpot, 0.5),
        "TPOT_p99_ms": at(tpot, 0.99),
        # Until the last answer: the queue of an overload takes its time to drain.
        "tokens_per_s": sum(a.num_tokens for a in arrivals) / max(a.last for a in arrivals),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.9, 1.5])
    parser.add_argument("--policies", nargs="+", default=["slack", "priority", "fcfs"])
    parser.add_argument("--traffic", type=Path, default=TRAFFIC)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings, classes = read_traffic(args.traffic)
    able = capacity(settings, classes)
    print(f"capacity of an instance: {able:.2f} requests/s")
    rows = []
    for load in args.load:
        seconds = 60 * args.minutes
        for policy in args.policies:
            begin = time.perf_counter()
            arrivals = list(traffic(settings, classes, load * able * args.instances, seconds))
            # As a router does: collections of what waits in a long line would be most of the time.
            keep_collector_out_of_steps()
            instances = simulate(settings, classes, policy, arrivals, args.instances)
            took = time.perf_counter() - begin
            steps = sum(instance.engine.stats.steps for instance in instances)
            errors = [instance.engine.prediction_errors() for instance in instances]
            for name in classes:
                of_class = [arrival for arrival in arrivals if arrival.slo.name == name]
                oldest = max(instance.oldest_wait.get(name, 0.0) for instance in instances)
                row = {"policy": policy, "load": f"{load:g}", "class": name, "oldest_wait_s": oldest}
                rows.append(row | figures(of_class, seconds))
            print(table(rows[-len(classes) :], COLUMNS))
            sizes = statistics.mean(a.num_tokens for a in arrivals)
            print(
                f"{took:.0f} s for {steps} steps ({1e3 * took / steps:.2f} ms each), {sizes:.0f} tokens an answer; "
                f"predictions off by {100 * max(e[0] for e in errors):.1f}% (p99 {100 * max(e[1] for e in errors):.0f}%)",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"capacity": able, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
