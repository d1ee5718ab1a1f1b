"""Runs a scheduler's batch on a model: one forward, sampling, verification."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.rows import Rows, RowWork
from tailserve.engine.model.spans import Span
from tailserve.engine.speculation.drafter import RowStates, StateMessage
from tailserve.engine.speculation.sampled import verify_sampled
from tailserve.engine.speculation.sampling import (
    SamplingPoint,
    apply_penalties,
    has_penalties,
    sample,
    token_logprobs,
)
from tailserve.engine.speculation.verify import verify
from tailserve.engine.types import Batch, StepResult, TokenLogprob

STATES_AT_ONCE = 256
"""Tokens of one row whose states are sent, the last ones: drafts look no further back."""


class ModelRunner:
    """The verifier's side of a step. Rows live here; blocks are the scheduler's business."""

    def __init__(
        self,
        model: PagedModel,
        publish: Callable[[StateMessage], object] | None = None,
        *,
        block_verification: bool = False,
    ) -> None:
        """`publish` gets hidden states before the step is answered; the model is `tap`ped then. `block_verification` of
        drafts that were drawn by chance, instead of the token rule."""
        self._model = model
        self._block = block_verification
        self._publish = publish
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
        if self._publish is not None and (batch.states or batch.leaves):
            self._publish(StateMessage(batch.step, self._states(work, token_ids) if batch.states else [], batch.leaves))
        return StepResult(batch.step, token_ids, logprobs, time.perf_counter() - begin)

    def _states(self, work: list[RowWork], token_ids: list[list[int]]) -> list[RowStates]:
        features = self._model.features
        if features is None:
            return []
        result, first = [], 0
        for entry, tokens in zip(work, token_ids, strict=True):
            count = len(entry.token_ids) - len(entry.draft) + max(len(tokens) - 1, 0)
            skipped = max(count - STATES_AT_ONCE, 0)
            part = features[first + skipped : first + count].to("cpu", torch.bfloat16)
            start = entry.start + skipped
            following = entry.row.token_ids[start + 1 : entry.start + count + 1]
            result.append(RowStates(entry.number, start, following, part.view(torch.int16).numpy().tobytes()))
            first += len(entry.token_ids)
        return result

    @torch.inference_mode()
    def _choose(self, work: list[RowWork], logits: torch.Tensor, logprobs: dict[int, list[TokenLogprob]]) -> list[list[int]]:
        points: list[SamplingPoint] = []
        by_chance: dict[int, torch.Tensor] = {}
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
            if entry.candidates:
                by_chance[entry.number] = logits[first : len(points)].clone()
        drawn = sample(logits, points, self._model.pick) if points else []
        results: list[list[int]] = []
        first = 0
        for entry in work:
            if not entry.samples:
                results.append([])
                continue
            count = len(entry.draft) + 1
            tokens = (
                self._verify_sampled(entry, by_chance[entry.number])
                if entry.candidates
                else verify(entry.draft, drawn[first : first + count])
            )
            first += count
            entry.row.token_ids += tokens
            results.append(tokens)
            num_top = entry.row.sampling.logprobs
            if num_top is not None:
                logprobs[entry.number] = token_logprobs(raw[entry.number][: len(tokens)], tokens, num_top)
        return results

    def _verify_sampled(self, entry: RowWork, logits: torch.Tensor) -> list[int]:
        row = entry.row
        position = len(row.token_ids)
        return verify_sampled(
            logits,
            row.sampling,
            entry.draft,
            entry.candidates,
            position=position,
            num_output=position - row.prompt_len,
            block=self._block,
        )
