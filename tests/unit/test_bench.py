"""The load generator against the real edge over a fake model."""

import asyncio
import json
from pathlib import Path

import pytest
from edge import Edge

from tailserve.deployments.bench.load import Client, Sample, Workload, closed_loop, open_loop
from tailserve.deployments.bench.report import attainment, summarize
from tailserve.deployments.cli import main


def url(edge: Edge) -> str:
    return str(edge.http.base_url)


async def test_closed_loop_counts_every_token(edge: Edge) -> None:
    async with Client(url(edge)) as client:
        samples = await closed_loop(client, Workload("w", 12, 20, vocab_size=90), concurrency=3, requests=7, seed=1)
    assert [(s.num_tokens, s.error) for s in samples] == [(20, None)] * 7
    for sample in samples:
        assert sample.sent < sample.pieces[0] <= sample.pieces[-1]
        assert sample.tpot == pytest.approx(sum(sample.gaps) / 19)


def test_events_without_text_are_no_pieces_of_an_answer() -> None:
    """Some servers send one for each token, also for those that are but a part of a character."""
    sample = Sample("w", 0.0)
    for now, choice in enumerate(
        ({"text": ""}, {"text": "a"}, {"delta": {"role": "assistant"}}, {"delta": {"content": "b"}})
    ):
        Client._take(b"data: " + json.dumps({"choices": [choice]}).encode(), float(now), sample)
    assert (sample.text, sample.pieces) == ("ab", [1.0, 3.0])


async def test_open_loop_sends_both_classes_whatever_the_server_does(edge: Edge) -> None:
    works = [Workload(name, 4, 5, vocab_size=90, headers={"X-SLO-Class": name}) for name in ("critical", "normal")]
    async with Client(url(edge)) as client:
        samples = await open_loop(client, works, rate=100, duration_s=0.3, seed=2)
    assert len(samples) > 10
    assert {s.workload for s in samples} == {"critical", "normal"}
    assert not [s for s in samples if s.error]


async def test_refusals_are_failures_not_figures(edge: Edge) -> None:
    async with Client(url(edge)) as client:
        [sample] = await closed_loop(client, Workload("w", 500, 5, vocab_size=90), concurrency=1, requests=1, seed=1)
    assert sample.error is not None
    assert sample.error.startswith("400")
    assert summarize([sample], 1.0)["failed"] == 1
    assert attainment([sample], ttft_s=9, tpot_s=9) == 0


def test_figures_of_a_known_answer() -> None:
    sample = Sample("w", 10.0, [10.5, 10.6, 10.9], num_tokens=5)
    figures = summarize([sample], 2.0)
    assert figures["tokens_per_s"] == 2.5
    assert figures["TTFT_p50_ms"] == pytest.approx(500)
    assert figures["TPOT_p50_ms"] == pytest.approx(100)
    assert figures["ITL_p50_ms"] == pytest.approx(200)
    assert attainment([sample], ttft_s=0.6, tpot_s=0.11) == 1
    assert attainment([sample], ttft_s=0.4, tpot_s=0.11) == 0


async def test_command_prints_a_table_and_writes_both_files(
    edge: Edge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "tail.png"
    sizes = ["--prompt-tokens", "9", "--output-tokens", "8", "--vocab-size", "90"]
    command = ["bench", url(edge), "--rate", "50", "--duration", "0.4", *sizes, "--json", str(figures), "--plot", str(plot)]
    assert await asyncio.to_thread(main, command) == 0
    assert "TTFT_p99" in capsys.readouterr().out
    assert [row["load"] for row in json.loads(figures.read_text())] == ["50/s critical", "50/s normal"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_server_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:9"]) == 2
    assert "is it the server's base URL" in capsys.readouterr().err
    assert main(["bench", "http://127.0.0.1:9", "--concurrency", "0"]) == 2
    assert "--concurrency must be above 0" in capsys.readouterr().err
