"""The README's claims that can be checked without running a server; the commands are run by tests/acceptance and CI."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tailserve.cluster.config import parse_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_example_configurations_are_valid() -> None:
    found = re.findall(r"<!-- config -->\n```yaml\n(.*?)```", README, re.DOTALL)
    first, second = (parse_config(yaml.safe_load(text)) for text in found)
    assert first.speculation == 4
    assert first.resources.verifier_gpus == 1
    assert [tenant.name for tenant in second.tenants] == ["gold", "free"]


def test_there_are_two_set_up_commands_of_one_line() -> None:
    for marker in ("serve", "test"):
        found = re.search(rf"<!-- command: {marker} -->\n```sh\n(.*?)\n```", README, re.DOTALL)
        assert found is not None
        assert "\n" not in found[1]


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
