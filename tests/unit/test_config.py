from pathlib import Path
from typing import Any

import pytest
from fakes import engine_config

from tailserve.cluster import placement
from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.cluster.files import read_config_file, with_tenants_of_file
from tailserve.deployments.cli import _parser, resolve_config
from tailserve.engine.config import EngineConfig
from tailserve.engine.errors import ConfigError


def resolve(*argv: str) -> TailserveConfig:
    return resolve_config(_parser().parse_args(["serve", *argv]))


def test_defaults_have_the_two_classes() -> None:
    critical, normal = parse_config({}).classes()
    assert (critical.name, critical.ttft_s, critical.tpot_s) == ("critical", 0.5, 0.04)
    assert (normal.name, normal.ttft_s, normal.tpot_s) == ("normal", 5.0, 0.2)
    assert critical.priority < normal.priority


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_num_seqs: 7\nspeculation: 'off'\nmodel: from-file\n")
    config = resolve("--config", str(file), "--max-num-seqs", "9")
    assert (config.max_num_seqs, config.speculation, config.model) == (9, "off", "from-file")
    assert resolve("my-model", "--config", str(file)).model == "my-model"
    assert [slo.speculation for slo in resolve("--speculation", "6").classes()] == [6, 6]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"max_num_seq": 1}, "max_num_seq: Extra inputs"),
        ({"slo_classes": [{"name": "a", "priority": 1}]}, "ttft_s: Field required"),
        ({"default_class": "gold"}, "default_class is 'gold'.*critical, normal"),
        ({"service_tiers": {"flex": "gold"}}, "service_tiers.flex is 'gold'"),
        ({"max_num_seqs": 600}, "max_num_batched_tokens is 512, below max_num_seqs"),
        ({"speculation": 99}, "use auto, off, or 1 to 32"),
        ({"speculation": "sometimes"}, "speculation"),
        ({"tensor_parallel_size": 2, "quantization": "int8"}, "tensor_parallel_size is above 1"),
        ({"slo_classes": [{"name": n, "priority": 1, "ttft_s": 1, "tpot_s": 1} for n in "aa"]}, "twice"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config(data)


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="no mapping"):
        read_config_file(str(tmp_path / "c.yaml"))
    with pytest.raises(ConfigError, match="cannot read"):
        read_config_file(str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens"),
        ({"num_blocks": 15}, "max_model_len"),
        ({"classes": ()}, "slo_classes"),
    ],
)
def test_engine_sizes_that_cannot_work(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_config(**changes)
    assert caught.value.param == param


def test_a_config_round_trips_through_serve_arguments() -> None:
    config = parse_config({"max_num_seqs": 5})
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_class_may_speculate_otherwise_than_the_rest() -> None:
    classes = [{"name": n, "priority": 1, "ttft_s": 1, "tpot_s": 1} for n in ("critical", "normal", "bulk")]
    classes[0]["speculation"], classes[1]["speculation"] = 5, "auto"
    config = parse_config({"slo_classes": classes, "speculation": "off"})
    assert [slo.speculation for slo in config.classes()] == [5, "auto", "off"]
    assert config.drafts
    assert not parse_config({"speculation": "off"}).drafts
    assert not parse_config({"speculation": 0}).drafts
    assert not parse_config({"draft_model": "none"}).drafts


def test_outcomes_are_prepared_by_a_draft_with_a_device_of_its_own() -> None:
    assert parse_config({}).num_outcomes == 0
    assert parse_config({"resources": {"verifier_gpus": 1, "draft_gpus": 1}}).num_outcomes == 8
    assert parse_config({"pre_speculation": 3}).num_outcomes == 3


def test_bundles() -> None:
    gpu = parse_config({"resources": {"verifier_gpus": 1, "draft_gpus": 0.5}, "draft_model": "d", "num_instances": 2})
    assert placement.bundles(gpu) == [{"CPU": 0.25}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.25, "GPU": 0.5}]
    assert placement.total_cpus(gpu) == 3.25
    assert len(placement.bundles(parse_config({"draft_model": "none"}))) == 2
    spread = parse_config({"tensor_parallel_size": 2, "resources": {"verifier_gpus": 1, "draft_gpus": 0.5}})
    assert [bundle.get("GPU") for bundle in placement.bundles(spread)] == [None, 1.0, 1.0, 0.5]
    assert placement.draft_bundle(spread) == 3


def test_the_engine_configuration_is_frozen() -> None:
    config: EngineConfig = engine_config()
    with pytest.raises(AttributeError):
        config.max_num_seqs = 1  # type: ignore[misc]


def test_tenants_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(f"- {{name: gold, api_key_hashes: [{'a' * 64}]}}\n")
    own = [{"name": "free", "api_key_hashes": ["b" * 64], "classes": ["normal"]}]
    config = with_tenants_of_file(parse_config({"tenants": own, "tenants_file": str(file)}))
    assert [tenant.name for tenant in config.tenants] == ["free", "gold"]
    assert with_tenants_of_file(config) is config
    for text, match in (
        (f"- {{name: free, api_key_hashes: [{'c' * 64}]}}", "tenant or a key twice"),
        ("gold: {}", "holds no list"),
        ("- [", "cannot read tenants_file"),
        ("- 2026-13-01", "cannot read tenants_file"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=match):
            with_tenants_of_file(parse_config({"tenants": own, "tenants_file": str(file)}))
    file.write_text("[]")
    with pytest.raises(ConfigError, match="lists nobody"):
        with_tenants_of_file(parse_config({"tenants_file": str(file)}))


def test_a_port_that_this_machine_has_free_is_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from tailserve.cluster import settings

    for name in (*settings.SERVE_ENVIRONMENT, *settings.PROXY_PORTS):
        monkeypatch.setenv(name, "kept")
    before = dict(settings.SERVE_ENVIRONMENT)
    assert settings.prepare_serve()["RAY_SERVE_HAPROXY_STATS_PORT"] == "kept"
    assert before == settings.SERVE_ENVIRONMENT
