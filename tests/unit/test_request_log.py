"""Lines of log for answers: which, what they say, and what they never do."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from edge import Edge

from tailserve.cluster.config import Logged
from tailserve.deployments.generation import Generation
from tailserve.deployments.metrics import Page
from tailserve.deployments.request_log import RequestLog
from tailserve.deployments.telemetry import RequestMetrics
from tailserve.engine.errors import NotReadyError, QueueFullError
from tailserve.engine.types import FinishReason, Request, SamplingParams, SloClass

CLASSES = {
    "normal": SloClass(name="normal", priority=1, ttft_s=60.0, tpot_s=60.0),
    "critical": SloClass(name="critical", priority=0, ttft_s=0.0, tpot_s=60.0, max_queued=0),
}

REQUEST = Request(
    id="r/u/0",
    prompt_token_ids=(1,),
    sampling=SamplingParams(max_tokens=5, seed=0),
    slo_class="normal",
    tenant="t",
)


async def lines(tmp_path: Path, caplog: pytest.LogCaptureFixture, which: Logged) -> list[logging.LogRecord]:
    """Of an answer in time, and of one that is late."""
    edge, log = Edge(tmp_path), RequestLog(which)
    counts = RequestMetrics(Page(model_name="tiny", instance="front"), CLASSES)
    edge.service.note_end = lambda choice, reason: log.note(choice, reason, met=counts.note(choice, reason))
    await edge.open()
    with caplog.at_level(logging.INFO, "tailserve.requests"):
        for number, priority in enumerate((0, -1)):
            extra = {"priority": priority, "request_id": f"mine\n/{number}"}
            await edge.client.completions.create(model="tiny", prompt="secret", max_tokens=5, extra_body=extra)
    await edge.close()
    return [record for record in caplog.records if record.name == "tailserve.requests"]


async def test_a_line_says_which_request_it_was_and_where_its_time_went(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = await lines(tmp_path, caplog, "all")
    assert (first.client_request_id, second.client_request_id) == ("mine\n/0", "mine\n/1")
    assert (first.slo_class, first.finish_reason, first.slo_met) == ("normal", "length", True)
    assert (first.prompt_tokens, first.output_tokens, first.num_preemptions) == (6, 5, 0)
    assert 0 < first.queue_s + first.prefill_s + first.decode_s < 10
    assert not second.slo_met
    for record in (first, second):
        assert "\n" not in record.getMessage()
        assert "secret" not in str(vars(record))


@pytest.mark.parametrize(("which", "count"), [("none", 0), ("missed", 1)])
async def test_only_those_that_were_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, which: Logged, count: int
) -> None:
    found = await lines(tmp_path, caplog, which)
    assert [record.slo_class for record in found] == ["critical"] * count


async def test_a_refusal_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tailserve.requests"):
        RequestLog("missed").note_refusal(REQUEST, NotReadyError("gone"), met=False)
        # Its class was full: no miss, and no line for each of them.
        RequestLog("missed").note_refusal(REQUEST, QueueFullError("full", retry_after_s=1.0), met=None)
    (record,) = caplog.records
    assert (record.client_request_id, record.tenant, record.error) == ("r", "t", "not_ready")


@pytest.mark.parametrize(("reason", "verb"), [(FinishReason.ABORT, "left"), (FinishReason.ERROR, "failed")])
async def test_who_left_or_failed_was_not_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: FinishReason, verb: str
) -> None:
    edge, log = Edge(tmp_path), RequestLog("all")
    with caplog.at_level(logging.INFO, "tailserve.requests"):
        (choice,) = Generation(edge.router, edge.service._text, [REQUEST], stops=[]).choices
        log.note(choice, reason, met=None if reason is FinishReason.ABORT else False)
    await asyncio.to_thread(edge.calls.loop.stop)
    assert caplog.records[-1].getMessage().startswith(f"{verb}: ")
