"""What the scheduler promises beside targets, on simulated time (see simulate.py): each line one command.

Run: python tests/benchmarks/tail.py fairness | returns | loadstep [--plot FILE] | tradeoff [--plot FILE]

fairness: one tenant sends ten times what each of the others does; what becomes of the others' p99.
returns:  a full queue; are clients that come back when told admitted, and were they told the truth.
loadstep: a minute of overload; the cap of the normal class, and the p99 of its pace, over time.
tradeoff: tokens a second at critical targets of 30, 40, 60 and 80 ms a token, against no classes at all.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import simulate
from fakes import make_request
from msgspec.structs import replace
from simulate import Arrival, Instance

from tailserve.deployments.bench.report import table
from tailserve.engine.admission import Admission
from tailserve.engine.types import Request

SECONDS = 300.0
TRACES = 4


class Setting:
    """The traffic of the file, and an instance's capacity for it."""

    def __init__(self) -> None:
        self.settings, self.classes = simulate.read_traffic(simulate.TRAFFIC)
        self.able = simulate.capacity(self.settings, self.classes)
        print(f"capacity: {self.able:.2f} requests/s")

    def arrivals(self, load: float, seconds: float = SECONDS, *, seed: int = 0) -> list[Arrival]:
        settings = self.settings | {"seed": self.settings["seed"] + seed}
        return list(simulate.traffic(settings, self.classes, load * self.able, seconds))

    def run(self, arrivals: list[Arrival], policy: str = "slack") -> Instance:
        (instance,) = simulate.simulate(self.settings, self.classes, policy, arrivals, 1)
        return instance


def p99(values: list[float]) -> float:
    return sorted(values)[min(int(0.99 * len(values)), len(values) - 1)]


def fairness(setting: Setting, _: argparse.Namespace) -> None:
    """Four small tenants with a tenth of the capacity each, and a fifth with as much, then ten times as much; and what
    that is when it comes from ten tenants instead of one. Four traces of each: the worst of one are a burst or two."""
    rows = []
    for label, loud in (("as much", [0.1]), ("ten times", [1.0]), ("ten tenants", [0.1] * 10)):
        seen: list[Arrival] = []
        for trace in range(TRACES):
            arrivals = []
            for number, load in enumerate([0.1] * 4 + loud):
                for arrival in setting.arrivals(load, seed=100 * trace + number):
                    arrival.tenant = f"t{number}"
                    arrivals.append(arrival)
            arrivals.sort(key=lambda arrival: arrival.at)
            setting.run(arrivals)
            seen += arrivals
        for name in setting.classes:
            small = [a for a in seen if a.slo.name == name and a.tenant in {"t0", "t1", "t2", "t3"}]
            big = [a for a in seen if a.slo.name == name and a.tenant == "t4"]
            rows.append(
                {
                    "the fifth sends": label,
                    "class": name,
                    "requests": len(small),
                    "others_TTFT_p99_ms": 1e3 * p99([a.ttft for a in small]),
                    "others_TPOT_p99_ms": 1e3 * p99([a.tpot for a in small]),
                    "others_met_%": 100 * sum(a.met for a in small) / len(small),
                    "its_TTFT_p99_ms": 1e3 * p99([a.ttft for a in big]),
                }
            )
    print(table(rows, list(rows[0])))


def returns(setting: Setting, _: argparse.Namespace) -> None:
    """At 1.5 of the capacity with 64 places in the normal queue; whoever is refused comes back once, when told."""
    classes = setting.classes | {"normal": replace(setting.classes["normal"], max_queued=64)}
    for arrival in (arrivals := setting.arrivals(1.5)):
        arrival.slo = classes[arrival.slo.name]
    instance = Instance(setting.settings, tuple(classes.values()), "slack", 0)
    admission = Admission(tuple(classes.values()))
    pending: list[tuple[float, int, Arrival, Request]] = [
        (a.at, number, a, make_request([number] * a.num_prompt, max_tokens=a.num_output, slo_class=a.slo.name))
        for number, a in enumerate(arrivals)
    ]
    told: set[int] = set()
    waits, admitted, back = [], 0, 0
    waiting: list[tuple[float, int, float]] = []
    while pending:
        pending.sort(key=lambda entry: entry[:2])
        at, number, arrival, request = pending.pop(0)
        while instance.clock.now < at and instance.engine.has_work:
            instance.run_until(min(at, instance.clock.now + 0.05))
            started = instance.engine.load().classes["normal"].num_started
            waits += [(told_s, instance.clock.now - then) for needed, then, told_s in waiting if started >= needed]
            waiting = [entry for entry in waiting if started < entry[0]]
        instance.run_until(at)
        load = instance.engine.load()
        admission.note(load, at)
        line = admission._lines[arrival.slo.name]
        ahead = line.num_queued + len(line.kept) - arrival.slo.max_queued + 1
        wait = admission.ask(request, at)
        if number in told:
            back += 1
            admitted += wait is None
        if wait is None:
            instance.open[request.id] = arrival
            instance.engine.add(request)
        elif number not in told:
            told.add(number)
            waiting.append((load.classes["normal"].num_started + ahead, at, wait))
            pending.append((at + wait, number, arrival, request))
    print(
        f"{len(told)} of {len(arrivals)} refused; {back} came back when told, {100 * admitted / max(back, 1):.1f}% admitted"
    )
    ratio = statistics.median(said / true for said, true in waits if true > 0)
    print(
        f"told / true wait: median {ratio:.2f} of {len(waits)}; told {statistics.median(w for w, _ in waits):.0f} s (median)"
    )


def loadstep(setting: Setting, args: argparse.Namespace) -> None:
    """Half of the capacity, twice of it from 60 to 120 s, and half again."""
    arrivals = setting.arrivals(0.5, 240)
    arrivals += [a for a in setting.arrivals(1.5, 120, seed=1) if a.at >= 60]
    arrivals.sort(key=lambda arrival: arrival.at)
    instance = Instance(setting.settings, tuple(setting.classes.values()), "slack", 0)
    seen = []
    for arrival in arrivals:
        while instance.clock.now < arrival.at and instance.engine.has_work:
            instance.run_until(min(arrival.at, instance.clock.now + 0.05))
            pace = instance.engine.paces()["normal"]
            seen.append((instance.clock.now, pace.cap, 1e3 * pace.p99_s, instance.engine.gauges().num_running))
        instance.run_until(arrival.at)
        instance.add(arrival)
    target = 1e3 * setting.classes["normal"].tpot_s
    before = statistics.median(cap for at, cap, _, _ in seen if at < 60)
    near = next((at for at, _, pace, _ in seen if at > 60 and pace > 0.95 * target), None)
    print(f"cap before: {before:g}; the least: {min(cap for at, cap, _, _ in seen if at > 60)}; at the end: {seen[-1][1]}")
    if near is not None:
        then = [cap for at, cap, _, _ in seen if at < near][-1]
        fallen = next((at for at, cap, _, _ in seen if at >= near and cap < 0.95 * then), float("inf"))
        print(f"p99 neared its target at {near:.1f} s, the cap had fallen {fallen - near:.1f} s later")
    if args.plot:
        _plot(args.plot, seen, target)


def _plot(path: Path, seen: list[tuple[float, int, float, int]], target: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True)
    at = [entry[0] for entry in seen]
    top.plot(at, [entry[1] for entry in seen], label="cap of the normal class")
    top.plot(at, [entry[3] for entry in seen], label="sequences that run", alpha=0.6)
    bottom.plot(at, [entry[2] for entry in seen], label="p99 of the normal class's time per token, ms")
    bottom.axhline(target, color="k", linestyle=":", label="its target")
    bottom.set_xlabel("s")
    for axis in (top, bottom):
        axis.legend()
        axis.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def tradeoff(setting: Setting, args: argparse.Namespace) -> None:
    """Everything there at once, as much as keeps the instance busy."""

    rows: list[dict[str, Any]] = []
    for policy, tpot_s in (("fcfs", 0.08), *(("slack", target) for target in (0.03, 0.04, 0.06, 0.08))):
        classes = setting.classes | {"critical": replace(setting.classes["critical"], tpot_s=tpot_s)}
        arrivals = setting.arrivals(2.0, 120)
        for arrival in arrivals:
            arrival.slo = classes[arrival.slo.name]
        simulate.simulate(setting.settings, classes, policy, arrivals, 1)
        critical = [a for a in arrivals if a.slo.name == "critical"]
        rate = sum(a.num_tokens for a in arrivals) / max(a.last for a in arrivals)
        rows.append(
            {
                "policy": policy,
                "critical_target_ms": 1e3 * tpot_s,
                "tokens_per_s": rate,
                "of_no_classes_%": 100 * rate / (rows[0]["tokens_per_s"] if rows else rate),
                "critical_TPOT_p99_ms": 1e3 * p99([a.tpot for a in critical]),
                "critical_met_%": 100 * sum(a.met for a in critical) / len(critical),
            }
        )
    print(table(rows, list(rows[0])))
    if args.plot:
        _plot_rates(args.plot, rows)


def _plot_rates(path: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.figure(figsize=(6, 4))
    pyplot.plot([r["critical_target_ms"] for r in rows[1:]], [r["tokens_per_s"] for r in rows[1:]], "o-", label="slack")
    pyplot.axhline(rows[0]["tokens_per_s"], linestyle=":", color="k", label="no classes")
    pyplot.xlabel("critical target, ms a token")
    pyplot.ylabel("tokens a second in all")
    pyplot.ylim(0)
    pyplot.legend()
    pyplot.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines = {"fairness": fairness, "returns": returns, "loadstep": loadstep, "tradeoff": tradeoff}
    parser.add_argument("line", choices=lines)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    lines[args.line](Setting(), args)


if __name__ == "__main__":
    main()
