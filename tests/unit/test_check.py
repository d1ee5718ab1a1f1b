"""What `tailserve check` says of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TINY, save_model
from transformers import LlamaConfig

from tailserve.deployments import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(LlamaConfig(**TINY), tmp_path_factory.mktemp("tiny"))


def test_says_what_runs_where_and_what_memory_it_takes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        "tensor_parallel_size: 2\nnum_instances: 2\ndtype: float32\nnum_kv_blocks: 100\nblock_size: 16\n"
        "resources: {verifier_gpus: 1, draft_gpus: 0.5}\n"
    )
    assert cli.main(["check", model, "--config", str(tmp_path / "config.yaml"), "--max-model-len", "1000"]) == 0
    out = capsys.readouterr().out
    assert "instances   2, each on one node" in out
    assert "2 ranks, each 1 CPU and 1 GPU" in out
    # 3 layers, 2 heads of keys and of values with 16 numbers of 4 bytes, half of them on each rank.
    assert "KV 384 bytes a token, 384 kB for one sequence of 1000; KV pool: 1600 tokens" in out
    assert "together    5.25 CPU and 5 GPU" in out
    assert "class       critical: priority 0, first token within 0.5 s, then 40 ms a token" in out
    assert "anybody who reaches it may use it" in out


def test_a_mistake_is_told_by_name(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", model, "--max-num-seqs", "0"]) == 2
    assert "max_num_seqs" in capsys.readouterr().err
