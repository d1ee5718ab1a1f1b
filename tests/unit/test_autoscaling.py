"""How many instances a load asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeExecutor, engine_config, make_request

from tailserve.cluster.autoscaling import count_instances, report
from tailserve.cluster.autoscaling_policy import InstancePolicy
from tailserve.cluster.config import parse_config
from tailserve.engine.engine import Engine
from tailserve.engine.errors import ConfigError

TARGETS = {"critical": 0.5, "normal": 5.0}


def one(
    slots: float = 0.0, *, kv: float = 0.0, critical_s: float = 0.0, normal_s: float = 0.0, **num_open: int
) -> dict[str, float]:
    return report(
        slots=slots, kv=kv, waits_s={"critical": critical_s, "normal": normal_s}, ttft_s=TARGETS, num_open=num_open
    )


def count(*reports: dict[str, float], current: int | None = None, least: int = 1, **by_class: int) -> int:
    current = len(reports) if current is None else current
    return count_instances(reports, current, utilization=0.7, least=least, least_by_class=by_class)


def test_as_many_as_hold_the_load_with_room_to_spare() -> None:
    assert count(one(0.5)) == 1
    assert count(one(0.8)) == 2
    assert count(one(2.5)) == 4
    assert count(one(0.2, kv=0.9)) == 2
    assert count(one(0.6), one(0.6), one(0.6)) == 3


def test_one_more_before_first_tokens_are_late() -> None:
    assert count(one(0.3, critical_s=0.2)) == 1
    assert count(one(0.3, critical_s=0.3)) == 2
    assert count(one(0.3, normal_s=3.0)) == 2
    # Who comes now goes to the other.
    assert count(one(0.3, critical_s=2.0), one(0.5)) == 2
    # However late, no more than twice those that run, whatever was asked for before.
    assert count(*[one(0.6, critical_s=60.0)] * 2, current=4) == 4
    assert count(*[one(0.6, critical_s=60.0)] * 2) == 4


def test_a_load_on_the_border_does_not_go_up_and_down() -> None:
    assert count(one(0.7), one(0.68), current=2) == 2
    assert count(one(0.36), one(0.36)) == 2
    assert count(one(0.34), one(0.34)) == 2
    assert count(one(0.27), one(0.27)) == 1


def test_a_class_keeps_its_instances_while_its_requests_come() -> None:
    assert count(one(0.1, critical=1), critical=3) == 3
    assert count(one(0.1, normal=1), critical=3) == 1
    assert count(one(0.1), least=2) == 2


def test_nothing_is_decided_before_an_instance_has_spoken() -> None:
    assert count(current=3) == 3


def test_what_serve_hands_over() -> None:
    def series(*values: float) -> list[Any]:
        return [SimpleNamespace(value=value) for value in values]

    policy = InstancePolicy(0.7, 1, {}, ["critical"])
    metrics = {"slots": {"a": series(0.9), "b": series(0.9)}, "lateness:critical": {"a": series(0.0), "b": series(0.0)}}
    context = SimpleNamespace(raw_metrics=metrics, running_replicas=["a", "b", "c"], target_num_replicas=3)
    assert policy(context) == (3, {})  # type: ignore[arg-type]
    # A burst of what is not urgent is over before an instance has started for it; what is urgent counts at once.
    for name, wanted in (("normal", 1), ("critical", 2)):
        metrics = {"slots": {"a": series(0.3, 0.3)}, f"lateness:{name}": {"a": series(0.0, 0.9)}}
        context = SimpleNamespace(raw_metrics=metrics, running_replicas=["a"], target_num_replicas=1)
        assert policy(context) == (wanted, {})  # type: ignore[arg-type]
    context = SimpleNamespace(raw_metrics={"running": {}}, running_replicas=["a"], target_num_replicas=2)
    assert policy(context) == (2, {})  # type: ignore[arg-type]


def test_an_engine_says_how_full_it_is() -> None:
    engine = Engine(config := engine_config(), FakeExecutor(config))
    assert engine.demand() == (0.0, {})
    for slo_class in ("critical", "normal", "normal", "normal", "normal", "normal"):
        engine.add(make_request([1, 2], slo_class=slo_class))
    assert engine.demand() == (6 / 4, {"critical": 1, "normal": 5})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"autoscaling": {"min_instances": 3, "max_instances": 2}}, "min_instances is 3, above max_instances"),
        ({"autoscaling": {"min_instances": 2, "max_instances": 3}}, "num_instances is 1, which autoscaling begins with"),
        (
            {
                "autoscaling": {"max_instances": 2},
                "slo_classes": [{"name": "normal", "priority": 1, "ttft_s": 1, "tpot_s": 1, "min_instances": 3}],
                "urgent_class": "normal",
                "service_tiers": {},
            },
            "slo_classes.normal.min_instances is 3",
        ),
    ],
)
def test_bounds_that_cannot_hold_are_named(data: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config(data)
