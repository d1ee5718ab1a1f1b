"""The command as a user runs it: processes of its own, its own Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from harness import free_port

TAILSERVE = str(Path(sys.executable).parent / "tailserve")


def test_serve_prints_its_url_answers_and_stops(tmp_path: Path) -> None:
    port = free_port()
    with subprocess.Popen(
        [TAILSERVE, "serve", "--port", str(port), "--max-num-seqs", "4", "--max-model-len", "512"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            begin = time.monotonic()
            seen: list[str] = []
            for line in process.stdout:
                seen.append(line)
                if f"ready: http://127.0.0.1:{port}" in line:
                    break
            else:
                pytest.fail("".join(seen))
            print(f"ready after {time.monotonic() - begin:.1f} s")
            body = {"messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 20, "temperature": 0}
            response = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
            assert response.json()["choices"][0]["message"]["content"].startswith("Gravity is")
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "'/no/such/model' is no local directory"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--config", "missing.yaml"], "cannot read the configuration file missing.yaml"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [TAILSERVE, "serve", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow  # Ray starts for it; why a model is refused is the unit tests' matter
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path) -> None:
    import shutil

    from transformers import Qwen3NextConfig

    from tailserve.deployments.models import resolve_model

    Qwen3NextConfig(num_hidden_layers=4, hidden_size=64, num_experts=4).save_pretrained(tmp_path)
    shutil.copy(resolve_model(None) / "tokenizer.json", tmp_path)
    result = subprocess.run(
        [TAILSERVE, "serve", str(tmp_path), "--port", str(free_port())],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("tailserve: ")
    assert "linear_attention" in last
