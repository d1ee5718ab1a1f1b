"""Runs a scheduler's batch on a model: one forward, sampling, verification."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from tailserve.engine.model.fork import Strand, first_strand, fork, keep
from tailserve.engine.model.host import host_blocks
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.rows import Rows
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


class _Result(NamedTuple):
    """What a step makes of a row."""

    strand: Strand
    token_ids: list[int]
    first_logit: int
    first_token: int
    """Of the strand, in the forward."""
    logprobs: list[TokenLogprob] | None = None


class ModelRunner:
    """The verifier's side of a step. Rows live here; blocks are the scheduler's business."""

    def __init__(
        self,
        model: PagedModel,
        publish: Callable[[StateMessage], object] | None = None,
        *,
        block_verification: bool = False,
        num_blocks: int | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        """`publish` gets hidden states before the step is answered; the model is `tap`ped then. `block_verification` of
        drafts that were drawn by chance, instead of the token rule. `num_blocks`: those that the scheduler lays out; the
        model's others are for branches. `num_host_blocks`: of the second tier."""
        self._model = model
        self._block = block_verification
        self._publish = publish
        self._fresh = True
        self._spares = range(model.num_blocks if num_blocks is None else num_blocks, model.num_blocks)
        self._rows = Rows()
        self._host = host_blocks(model.kv_parts(), num_host_blocks) if num_host_blocks else None

    def run(self, batch: Batch) -> StepResult:
        """Computes a batch. Draft tokens and bonus tokens alike are drawn with the noise of their own position."""
        begin = time.perf_counter()
        if self._host is not None:
            self._host.make(batch.moves)
        moved_s = time.perf_counter() - begin if batch.moves else 0.0
        work = list(self._rows.apply(batch))
        results: list[_Result] = []
        if work:
            strands = [first_strand(entry) for entry in work]
            if batch.branches:
                strands += fork(self._model, work, self._spares)
            logits = self._model.forward([strand.span for strand in strands])
            if logits.is_cuda and not len(logits):
                # Nothing is read, and a step takes as long as its work, not its launch.
                torch.cuda.current_stream(logits.device).synchronize()
            results = self._choose(strands, len(work), logits)
        if self._publish is not None and (batch.states or batch.leaves):
            states = self._states(results) if batch.states else []
            self._publish(StateMessage(batch.step, states, batch.leaves, self._fresh))
            self._fresh = False
        logprobs = {result.strand.entry.number: result.logprobs for result in results if result.logprobs is not None}
        token_ids = [result.token_ids for result in results]
        return StepResult(batch.step, token_ids, logprobs, time.perf_counter() - begin, moved_s)

    def _states(self, results: list[_Result]) -> list[RowStates]:
        features = self._model.features
        if features is None:
            return []
        states = []
        for result in results:
            strand, entry = result.strand, result.strand.entry
            count = len(strand.span.token_ids) - len(strand.draft) + max(len(result.token_ids) - 1, 0)
            skipped = max(count - STATES_AT_ONCE, 0)
            first = result.first_token
            part = features[first + skipped : first + count].to("cpu", torch.bfloat16)
            start = entry.start + skipped
            following = entry.row.token_ids[start + 1 : entry.start + count + 1]
            states.append(RowStates(entry.number, start, following, part.view(torch.int16).numpy().tobytes()))
        return states

    @torch.inference_mode()
    def _choose(self, strands: list[Strand], num_rows: int, logits: torch.Tensor) -> list[_Result]:
        """The tokens of each of the first `num_rows` strands' rows, by whichever of its strands holds longest."""
        points: list[SamplingPoint] = []
        raw: dict[int, torch.Tensor] = {}
        by_chance: dict[int, torch.Tensor] = {}
        places = []
        for strand in strands:
            entry, first = strand.entry, len(points)
            row, count = entry.row, strand.span.num_logits
            places.append((first, count))
            for offset in range(count):
                position = len(row.token_ids) + offset
                points.append(SamplingPoint(row.sampling, position, position - row.prompt_len))
            if count and row.sampling.logprobs is not None:
                raw[first] = logits[first : len(points)].clone()
            if has_penalties(row.sampling):
                known = row.token_ids
                for offset in range(count):
                    output = known[row.prompt_len :] + list(strand.draft[:offset])
                    apply_penalties(logits[first + offset], row.sampling, known[: row.prompt_len], output)
            if entry.candidates:
                by_chance[first] = logits[first : len(points)].clone()
        drawn = sample(logits, points, self._model.pick) if points else []
        best: dict[int, _Result] = {}
        first_token = 0
        for strand, (first, count) in zip(strands, places, strict=True):
            tokens: list[int] = []
            if count and strand.entry.candidates:
                tokens = self._verify_sampled(strand, by_chance[first])
            elif count:
                tokens = verify(strand.draft, drawn[first : first + count])
            number = strand.entry.number
            if number not in best or len(tokens) > len(best[number].token_ids):
                best[number] = _Result(strand, tokens, first, first_token)
            first_token += len(strand.span.token_ids)
        return [self._conclude(best[strand.entry.number], raw) for strand in strands[:num_rows]]

    def _conclude(self, result: _Result, raw: dict[int, torch.Tensor]) -> _Result:
        strand, tokens = result.strand, result.token_ids
        if strand.own:
            keep(self._model, strand, len(tokens) - 1)
        row = strand.entry.row
        row.token_ids += tokens
        sampling = row.sampling
        if sampling.logprobs is not None and tokens:
            ends = sampling.eos_token_ids if sampling.watch_end else ()
            chances = raw[result.first_logit][: len(tokens)]
            return result._replace(logprobs=token_logprobs(chances, tokens, sampling.logprobs, ends))
        return result

    def _verify_sampled(self, strand: Strand, logits: torch.Tensor) -> list[int]:
        row = strand.entry.row
        position = len(row.token_ids)
        return verify_sampled(
            logits,
            row.sampling,
            strand.draft,
            strand.entry.candidates,
            position=position,
            num_output=position - row.prompt_len,
            block=self._block,
        )
