"""The README's commands, as a newcomer would run them: a clean clone, an empty virtual environment. Slow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from chart import tool

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"


def command(marker: str) -> str:
    """A block of the README."""
    found = re.search(rf"<!-- command: {marker} -->\n```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


class Clone(NamedTuple):
    """What a newcomer has: a clone, and nothing installed."""

    directory: Path
    environment: dict[str, str]

    def run(self, line: str, said: str | None = None) -> str:
        """What a command prints; `said`: what is typed."""
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.directory, env=self.environment, input=said, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def serving(self, line: str) -> Iterator[None]:
        """While a command that serves runs. It ends by Ctrl-C."""
        begin = time.monotonic()
        with subprocess.Popen(
            ["bash", "-c", line], cwd=self.directory, env=self.environment, start_new_session=True
        ) as server:
            try:
                _wait_until_ready(begin)
                yield
            finally:
                os.killpg(server.pid, signal.SIGINT)
                server.wait(60)


def _wait_until_ready(begin: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{URL}/ready", timeout=5):
                print(f"ready after {time.monotonic() - begin:.0f} s, installation included")
                return
        except OSError:
            assert time.monotonic() - begin < 600, "not ready after 10 minutes"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    work = tmp_path_factory.mktemp("newcomer")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(work / "tailserve")], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
    environment = os.environ | {
        "PATH": f"{work / 'venv' / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(work / "venv"),
        "TAILSERVE_CACHE": str(work / "cache"),
        "RAY_AUTH_MODE": "disabled",
    }
    return Clone(work / "tailserve", environment)


@pytest.fixture(scope="module")
def installed(clone: Clone) -> Clone:
    """After the first half of the first command."""
    clone.run(command("serve").partition(" && ")[0])
    return clone


@pytest.fixture(scope="class")
def server(clone: Clone) -> Iterator[Clone]:
    """It serves until the tests of a class are done: others want the port."""
    with clone.serving(command("serve")):
        yield clone


class TestServed:
    """With what the first command serves."""

    def test_the_page(self, server: Clone) -> None:
        with urllib.request.urlopen(URL, timeout=10) as page:
            assert b"<title>" in page.read()

    def test_an_answer(self, server: Clone) -> None:
        events = [line.removeprefix("data: ") for line in server.run(command("chat")).splitlines() if line.strip()]
        assert events.pop() == "[DONE]"
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        answer = "".join(choice["delta"].get("content") or "" for choice in choices)
        print(answer)
        # By chance it names none of them once in thousands of answers.
        assert re.search("physics|force|gravity", answer, re.IGNORECASE)

    def test_a_chat_in_a_terminal(self, server: Clone) -> None:
        assert re.search("physics|force|gravity", server.run("tailserve chat", "What is gravity?\n"), re.IGNORECASE)

    def test_a_benchmark_and_its_plot(self, server: Clone) -> None:
        print(server.run(command("bench")))
        assert json.loads((server.directory / "figures.json").read_text())
        assert (server.directory / "tails.png").read_bytes().startswith(b"\x89PNG")


def test_what_would_run(installed: Clone) -> None:
    assert re.search(r"verifier .* weights about \d+ MB", installed.run("tailserve check"))


def test_a_key(installed: Clone) -> None:
    assert re.search(r"\b[0-9a-f]{64}\b", installed.run("tailserve key"))


def test_the_chart(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "helm").symlink_to(tool("helm4"))
    rendered = clone.run(f'export PATH="{tmp_path}:$PATH"; {command("chart")}')
    kinds = {thing["kind"] for thing in yaml.safe_load_all(rendered) if thing}
    assert {"RayService", "ConfigMap", "PrometheusRule"} <= kinds


def test_a_draft_of_its_own(installed: Clone) -> None:
    distill, _, serve = command("distill").partition(" && ")
    # A small one: the whole takes an hour.
    installed.run(f"{distill} --num-prompts 16 --passes 1")
    with installed.serving(serve):
        assert "[DONE]" in installed.run(command("chat"))


def test_the_tests(clone: Clone) -> None:
    clone.run(command("test"))
