"""The README's claims that can be checked without running a server; its commands are run by tests/acceptance and CI."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tailserve.cluster.config import parse_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
NEWCOMER = (ROOT / "tests" / "acceptance" / "test_readme.py").read_text()


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


def test_somebody_runs_every_command() -> None:
    marked = re.findall(r"<!-- command: (\w+) -->\n```sh\n", README)
    assert len(marked) == README.count("```sh\n") >= 6
    for marker in marked:
        assert f'command("{marker}")' in NEWCOMER, marker
    for subcommand in set(re.findall(r"`tailserve\s+(\w+)", README)) - {"serve"}:
        assert f'"tailserve {subcommand}"' in NEWCOMER, subcommand


def test_every_measured_line_has_its_command() -> None:
    table = README.split("## What it does, measured")[1].split("\n## ")[0]
    lines = re.findall(r"\| `(\w+) (\w+)` \|$", table, re.MULTILINE)
    assert len(lines) == table.count("\n| ") - 1 > 5
    for area, line in lines:
        assert re.search(rf"^{line}\(\)", (ROOT / "tests" / "acceptance" / area).read_text(), re.MULTILINE), (area, line)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
