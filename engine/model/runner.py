"""Runs a scheduler's batch on a model: one forward, sampling, verification."""

from __future__ import annotations

import time

import torch

from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.rows import Rows, RowWork
from tailserve.engine.model.spans import Span
from tailserve.engine.speculation.sampling import (
    SamplingPoint,
    apply_penalties,
    has_penalties,
    sample,
    token_logprobs,
)
from tailserve.engine.speculation.verify import verify
from tailserve.engine.types import Batch, StepResult, TokenLogprob


class ModelRunner:
    """The verifier's side of a step. Rows live here; blocks are the scheduler's business."""

    def __init__(self, model: PagedModel) -> None:
        self._model = model
        self._rows = Rows()

    def run(self, batch: Batch) -> StepResult:
        """Computes a batch. Draft tokens and bonus tokens alike are drawn with the noise of their own position."""
        begin = time.perf_counter()
        work = list(self._rows.apply(batch))
        token_ids: list[list[int]] = []
        logprobs: dict[int, list[TokenLogprob]] = {}
        if work:
            logits = self._model.forward(
                [
                    Span(entry.token_ids, entry.start, entry.row.block_ids, len(entry.draft) + 1 if entry.samples else 0)
                    for entry in work
                ]
            )
            token_ids = self._choose(work, logits, logprobs)
        return StepResult(batch.step, token_ids, logprobs, time.perf_counter() - begin)

    @torch.inference_mode()
    def _choose(self, work: list[RowWork], logits: torch.Tensor, logprobs: dict[int, list[TokenLogprob]]) -> list[list[int]]:
        points: list[SamplingPoint] = []
        raw: dict[int, torch.Tensor] = {}
        for entry in work:
            if not entry.samples:
                continue
            row, first = entry.row, len(points)
            for offset in range(len(entry.draft) + 1):
                position = len(row.token_ids) + offset
                points.append(SamplingPoint(row.sampling, position, position - row.prompt_len))
            if row.sampling.logprobs is not None:
                raw[entry.number] = logits[first : len(points)].clone()
            if has_penalties(row.sampling):
                known = row.token_ids
                for offset in range(len(entry.draft) + 1):
                    output = known[row.prompt_len :] + list(entry.draft[:offset])
                    apply_penalties(logits[first + offset], row.sampling, known[: row.prompt_len], output)
        drawn = sample(logits, points, self._model.pick) if points else []
        results: list[list[int]] = []
        first = 0
        for entry in work:
            if not entry.samples:
                results.append([])
                continue
            count = len(entry.draft) + 1
            tokens = verify(entry.draft, drawn[first : first + count])
            first += count
            entry.row.token_ids += tokens
            results.append(tokens)
            num_top = entry.row.sampling.logprobs
            if num_top is not None:
                logprobs[entry.number] = token_logprobs(raw[entry.number][: len(tokens)], tokens, num_top)
        return results
