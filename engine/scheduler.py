"""What a step is, and what became of the last one.

One rule for everything: sequences stand in line by their keys, whether they run or wait, generate or still read their
prompt; `composition.py` has who of them is in a step. A sequence has tokens, and `num_computed` catches up with them.
"""

from __future__ import annotations

from collections.abc import Mapping

from tailserve.engine.composition import Composition
from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import StepTimes
from tailserve.engine.errors import InvalidRequestError
from tailserve.engine.fairness import FairShares
from tailserve.engine.overdue import Overdue
from tailserve.engine.pins import Pins
from tailserve.engine.places import Places
from tailserve.engine.planner import Planner
from tailserve.engine.residency import Residency
from tailserve.engine.scheduled import Scheduled
from tailserve.engine.sequence import Key, Sequence
from tailserve.engine.slo import next_due_after
from tailserve.engine.speculation.drafter import Draft
from tailserve.engine.speculation.selection import DraftSelection
from tailserve.engine.stats import EngineStats
from tailserve.engine.stopping import Stop, check_stop, may_have_prefix
from tailserve.engine.types import Batch, FinishReason, Request, StepResult, TokenChunk, TokenLogprob

PACE_WEIGHT = 0.15
"""Of the newest tokens in a sequence's running mean of its pace."""


class Scheduler:
    """Continuous batching over one block pool. Not thread-safe: one loop owns it.

    A request that was added ends exactly once: by a chunk with a finish reason from `commit`, `take_ended`, `abort` or
    `lose_all`.
    """

    def __init__(self, config: EngineConfig, stats: EngineStats, selection: DraftSelection, times: StepTimes) -> None:
        self.config = config
        self.stats = stats
        self._selection = selection
        self.residency = Residency(config, stats)
        self.planner = Planner(config, times)
        self.pins = Pins(config, self.residency.pool, self.residency.host, times)
        self._overdue = Overdue(config, times, self.residency)
        self.classes = {slo.name: slo for slo in config.classes}
        self._shares = {slo.priority: FairShares(config.max_num_seqs) for slo in config.classes}
        self._places = Places(self.residency, {slo.name: self._shares[slo.priority] for slo in config.classes})
        self._composition = Composition(self.planner, self.residency, self._places, times)
        self._sequences: dict[str, Sequence] = {}
        self._timed: dict[str, Sequence] = {}
        self._ended: list[TokenChunk] = []
        self._in_flight: dict[int, list[Scheduled]] = {}
        self._num_steps = 0
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self.residency.leaves or self._ended)

    def add(self, request: Request, now: float, *, drafts: bool = False) -> None:
        """Puts a request in line. InvalidRequestError if it could never run, or its id is in use.

        `drafts`: whether there is one, which may write the first tokens.
        """
        slo = self.classes.get(request.slo_class)
        num_prompt = len(request.prompt_token_ids)
        if slo is None:
            raise InvalidRequestError(f"unknown SLO class {request.slo_class!r}", param="slo_class")
        if request.id in self._sequences:
            raise InvalidRequestError(f"request id {request.id!r} is already in use", param="request_id")
        if not 0 < num_prompt < self.config.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens; the context holds {self.config.max_model_len}, the answer included",
                param="prompt",
            )
        self._num_added += 1
        arrival_s = now - request.age_s
        tag, charge = self._shares[slo.priority].enter(request.tenant, num_prompt, request.sampling.max_tokens)
        fcfs = self.config.scheduling_policy == "fcfs"
        key = Key(0 if fcfs else slo.priority, late=False, tag=arrival_s if fcfs else tag, number=self._num_added)
        epoch = self.pins.epoch(request.tenant, request.session_id or "")
        seq = Sequence(request, slo, arrival_s, key, self.config.max_model_len, charge=charge, epoch=epoch)
        self._sequences[request.id] = seq
        if request.carried is not None:
            # That it is late is the fault of the instance that was lost.
            seq.first_due_s = now + slo.ttft_s
        may_have = not request.carried and may_have_prefix(request.sampling)
        seq.awaits_prefix = drafts and slo.speculative_prefix > 0 and may_have
        if request.timeout_s is not None:
            self._timed[request.id] = seq
        self.pins.begin(seq, now)
        self.residency.enter(seq)
        seq.num_found = self.residency.count_cached(seq)
        if self.residency.room(seq) <= 0:
            # Carried on from where the context was longer.
            self._ended.append(self._finish(seq, Stop(FinishReason.LENGTH)))

    def abort(self, request_id: str) -> TokenChunk | None:
        """Ends a request now; its blocks are free on return. None if there is no such request (any more)."""
        seq = self._sequences.get(request_id)
        return None if seq is None else self._finish(seq, Stop(FinishReason.ABORT))

    def lose_all(self, error: str) -> list[TokenChunk]:
        """Ends every request, with LOST."""
        return [self._finish(seq, Stop(FinishReason.LOST), error=error) for seq in list(self._sequences.values())]

    def take_ended(self) -> list[TokenChunk]:
        """Requests whose deadlines passed since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def schedule(self, now: float, drafts: Mapping[int, Draft], *, start: float | None = None) -> Batch | None:
        """The next batch, or None if there is nothing to do. `drafts` by row; those that no longer fit are dropped.
        `start`: when it will begin, if not at once.

        Steps under way count as done, so the next can wait behind them at the verifier. Not so behind a step with drafts:
        how many of them hold is not known before it is committed.
        """
        for seq in [seq for seq in self._timed.values() if seq.expired(now)]:
            self._ended.append(self._finish(seq, Stop(FinishReason.LENGTH, "deadline")))
        self._overdue.review(self._sequences.values(), now)
        self.pins.expire(now)
        if self.config.paced:
            caps = {name: pace.cap for name, pace in self.planner.paces.items()}
            self.residency.yield_slots(caps)
            self._places.review(caps)
        work, new_blocks, plan = self._composition.compose(now, now if start is None else start)
        # Drafts come last: they must not take the block or the token that somebody needs.
        self._selection.add(work, drafts, plan.count_drafts, self.residency, new_blocks)
        return self._pack(work, new_blocks, now)

    def commit(self, result: StepResult, now: float) -> list[TokenChunk]:
        """Advances the sequences of a step; the only place where that happens. Returns what clients are to get."""
        chunks = self.take_ended()
        self.stats.steps += 1
        self.stats.verifier_seconds += result.duration_s
        for entry, token_ids in zip(self._in_flight.pop(result.step), result.token_ids, strict=True):
            seq = entry.seq
            if seq.row != entry.row:
                continue  # it ended or was displaced while the step ran
            seq.num_computed = entry.start + entry.length
            if token_ids:
                self._note_pace(seq, len(token_ids), now)
                if not seq.num_output:
                    self._selection.policy.note_arrival(len(self.residency.running))
                seq.num_sampling -= 1
                seq.num_computed += len(token_ids) - 1
                seq.num_scheduled += len(token_ids) - 1
                self._selection.observe(entry, token_ids)
                chunks.append(self._append(seq, token_ids, result.logprobs.get(entry.row)))
            else:
                seq.moved_s = now
                self.residency.register(seq)
        return chunks

    def take_prefix(self, row: int, token_ids: list[int], now: float) -> TokenChunk | None:
        """What the draft wrote alone for a row that still awaits it; None if nothing of it can be used."""
        seq = next((seq for seq in self.residency.running if seq.row == row and seq.awaits_prefix), None)
        if seq is None:
            return None
        seq.awaits_prefix = False
        sampling = seq.request.sampling
        # No stop token of a draft ends an answer.
        ends = {*sampling.eos_token_ids, *sampling.stop_token_ids}
        count = next((place for place, token in enumerate(token_ids) if token in ends), len(token_ids))
        tokens = token_ids[: min(count, self.residency.room(seq) - 1)]
        if not tokens:
            return None
        self._note_pace(seq, len(tokens), now)
        seq.token_ids += tokens
        seq.num_prefix = len(tokens)
        self.stats.generated_tokens += len(tokens)
        self.stats.prefix_tokens += len(tokens)
        self._selection.policy.note_arrival(len(self.residency.running))
        self.residency.join(seq)
        return TokenChunk(seq.request.id, tuple(tokens), usage=seq.usage())

    def survivals(self, step: int) -> dict[int, tuple[list[int], list[float]]]:
        """See `DraftSelection.survivals`, of a step under way."""
        return self._selection.survivals(self._in_flight[step])

    def recover(self, most: int, error: str) -> list[TokenChunk]:
        """The verifier lost its rows and its KV: everything goes on from its tokens. But for what met `most` losses and got
        no token between them: it may be the cause, and ends with ERROR. Where steps were under way, who is in them meets it.
        """
        for seq in {entry.seq for work in self._in_flight.values() for entry in work} or self._sequences.values():
            seq.num_losses += 1
        self._in_flight.clear()
        self.residency.evacuate()
        causes = [seq for seq in self._sequences.values() if seq.num_losses >= most]
        return [self._finish(seq, Stop(FinishReason.ERROR), error=error) for seq in causes]

    def check_integrity(self) -> None:
        """Every block and every sequence is accounted for exactly once. AssertionError names what is not. O(blocks)."""
        self.residency.check_integrity()
        lines = self.residency.running + self.residency.waiting
        self.pins.check_integrity(content for seq in lines for content in seq.hashes[: seq.num_kept])
        assert len(lines) == len(self._sequences), "a sequence is in no line, or in two"
        assert {id(seq) for seq in lines} == {id(seq) for seq in self._sequences.values()}
        assert self._timed.keys() <= self._sequences.keys(), "a deadline outlived its request"

    def _note_pace(self, seq: Sequence, count: int, now: float) -> None:
        """`count` tokens more are there."""
        if seq.begun_s is None:
            seq.begun_s = now
            self._overdue.restore(seq)
        seq.aimed_s = self.planner.paces[seq.slo.name].aimed_s
        if seq.token_s is not None:
            # One slow step, right behind its first token, says little: it begins as one that is well on time.
            before = seq.slo.tpot_s / 2 if seq.pace_s is None else seq.pace_s
            seq.pace_s = before + PACE_WEIGHT * ((now - seq.token_s) / count - before)
        seq.due_s = next_due_after(seq, count, now, guarded=self.planner.is_guarded(seq))
        seq.token_s = seq.moved_s = now

    def _append(self, seq: Sequence, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> TokenChunk:
        stop: Stop | None = None
        taken = 0
        for token_id in token_ids:
            seq.token_ids.append(token_id)
            taken += 1
            stop = check_stop(token_id, seq.num_output, len(seq.token_ids), seq.request.sampling, self.config.max_model_len)
            if stop is not None:
                break
        self.stats.generated_tokens += taken
        seq.num_losses = 0
        # All but the last token of a step are drafts that held; what lies behind a stop was accepted for nothing.
        accepted = min(taken, len(token_ids) - 1)
        seq.num_accepted_drafts += accepted
        self.stats.accepted_draft_tokens += accepted
        by_position = self.stats.accepted_by_position
        for place in range(accepted):
            if place == len(by_position):
                by_position.append(0)
            by_position[place] += 1
        self.residency.register(seq)
        out = tuple(token_ids[:taken])
        kept = None if logprobs is None else tuple(logprobs[:taken])
        if stop is None:
            return TokenChunk(seq.request.id, out, kept, usage=seq.usage())
        self.planner.paces[seq.slo.name].note_end(seq)
        return self._finish(seq, stop, out, kept)

    def _finish(
        self,
        seq: Sequence,
        stop: Stop,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        *,
        error: str | None = None,
    ) -> TokenChunk:
        del self._sequences[seq.request.id]
        self._timed.pop(seq.request.id, None)
        if seq.row is not None:
            self.pins.end(seq)
        self.residency.remove(seq)
        computed = seq.prompt_len if seq.due_s is not None else 0
        self._shares[seq.slo.priority].end(seq.request.tenant, seq.charge, computed, seq.num_output)
        self.stats.finished[stop.reason] = self.stats.finished.get(stop.reason, 0) + 1
        return TokenChunk(seq.request.id, token_ids, logprobs, stop.reason, stop.detail, seq.usage(), error, seq.timeline())

    def _pack(self, work: list[Scheduled], new_blocks: dict[int, list[int]], now: float) -> Batch | None:
        if not work and not self.residency.leaves and not new_blocks:
            return None
        joins, self.residency.joins = self.residency.joins, []
        leaves, self.residency.leaves = self.residency.leaves, []
        step = self._num_steps
        self._num_steps += 1
        self._in_flight[step] = work
        for entry in work:
            self._shares[entry.seq.slo.priority].start(entry.seq.key.tag)
            entry.seq.note_step(now)
            entry.seq.num_scheduled += entry.length
            entry.seq.num_sampling += entry.samples
        return Batch(
            step=step,
            rows=[entry.row for entry in work],
            starts=[entry.start for entry in work],
            lengths=[entry.length for entry in work],
            samples=[entry.samples for entry in work],
            drafts={entry.row: entry.drafts[0] for entry in work if entry.drafts},
            candidates={entry.row: entry.candidates for entry in work if entry.candidates},
            branches={entry.row: entry.drafts[1:] for entry in work if len(entry.drafts) > 1},
            new_blocks=new_blocks,
            joins=joins,
            leaves=leaves,
            moves=self.residency.host.take_moves(),
        )
