"""The README's two set-up commands, as a newcomer would run them: a clean clone, an empty virtual environment. Slow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(marker: str) -> str:
    found = re.search(rf"<!-- command: {marker} -->\n```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    assert "\n" not in found[1], "a set-up command is one line"
    return found[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    work = tmp_path_factory.mktemp("newcomer")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(work / "tailserve")], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
    environment = os.environ | {
        "PATH": f"{work / 'venv' / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(work / "venv"),
        "TAILSERVE_CACHE": str(work / "cache"),
        "RAY_AUTH_MODE": "disabled",
    }
    return work / "tailserve", environment


def test_install_and_serve(clone: tuple[Path, dict[str, str]]) -> None:
    directory, environment = clone
    begin = time.monotonic()
    with subprocess.Popen(
        ["bash", "-c", command("serve")], cwd=directory, env=environment, start_new_session=True
    ) as server:
        try:
            _wait_until_ready(begin)
            question = {"messages": [{"role": "user", "content": "What is gravity?"}], "temperature": 0, "max_tokens": 60}
            request = urllib.request.Request(
                "http://127.0.0.1:8000/v1/chat/completions",
                json.dumps(question).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)["choices"][0]["message"]["content"]
            print(answer)
            assert "physics" in answer or "force" in answer
        finally:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(60)


def test_install_and_test(clone: tuple[Path, dict[str, str]]) -> None:
    directory, environment = clone
    subprocess.run(["bash", "-c", command("test")], cwd=directory, env=environment, check=True)


def _wait_until_ready(begin: float) -> None:
    while True:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/ready", timeout=5):
                print(f"ready after {time.monotonic() - begin:.0f} s, installation included")
                return
        except OSError:
            assert time.monotonic() - begin < 600, "not ready after 10 minutes"
            time.sleep(0.5)
