"""Stand-ins for the processes around an engine, strict about what they are told."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import count_tokens
from tailserve.engine.engine import Engine
from tailserve.engine.errors import ExecutorLostError
from tailserve.engine.model.rows import Rows
from tailserve.engine.speculation.drafter import DraftResult, DraftWork
from tailserve.engine.speculation.ngram import NgramDrafter
from tailserve.engine.speculation.verify import verify
from tailserve.engine.types import Batch, Request, SamplingParams, SloClass, StepResult, TokenChunk

CRITICAL = SloClass(name="critical", priority=0, ttft_s=0.5, tpot_s=0.04, max_queued=8, speculation=3)
NORMAL = SloClass(name="normal", priority=10, ttft_s=5.0, tpot_s=0.2, max_queued=8, speculation=3)
VOCAB = 50


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: a function of the whole context, so that any wrong token or position shows."""
    return (sum(token * (index % 7 + 1) for index, token in enumerate(tokens)) + len(tokens)) % VOCAB


def expected_answer(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeExecutor:
    """Runs batches on `next_token`, reading the context from simulated KV blocks, never from the message."""

    lost = False

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._reset()
        self.batches: list[Batch] = []
        self.fail_next = 0
        self.seconds = 0.001
        """How long it says that a step took. It answers at once, unless asked whether it would within a time."""
        self.move_s = 0.0
        """And of it each move of a block."""
        self.restarts = 0

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def submit(self, batch: Batch) -> None:
        # What the verifier would be sent, and would refuse if a field were of another type.
        batch = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch)
        self.waiting.append(batch)
        self.batches.append(batch)

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        if self.fail_next:
            self.fail_next -= 1
            raise ExecutorLostError("killed by the test")
        if timeout_s:
            return None
        batch = self.waiting.popleft()
        branches = sum(len(branch) + 1 for row in batch.branches.values() for branch in row)
        drafts = sum(map(len, batch.drafts.values()))
        assert sum(batch.lengths) + drafts + branches <= self._config.max_num_batched_tokens
        assert len(batch.rows) <= self._config.max_num_seqs
        results = []
        for move in batch.moves:
            if move.to_host:
                self._host[move.host_block] = list(self._kv[move.block])
            else:
                self._kv[move.block] = list(self._host[move.host_block])
        for work in self._rows.apply(batch):
            for offset, token in enumerate(work.token_ids):
                block, slot = self._locate(work.row.block_ids, work.start + offset)
                self._kv[block][slot] = token
            if not work.samples:
                results.append([])
                continue
            known = len(work.row.token_ids)
            context = [self._read(work.row.block_ids, position) for position in range(known + len(work.draft))]
            accepted: list[int] = []
            for draft in (work.draft, *work.branches):
                context[known:] = draft
                drawn = [next_token(context[: known + offset]) for offset in range(len(draft) + 1)]
                accepted = max(accepted, verify(draft, drawn), key=len)
            for offset, token in enumerate(accepted[:-1]):
                block, slot = self._locate(work.row.block_ids, known + offset)
                self._kv[block][slot] = token
            work.row.token_ids += accepted
            results.append(accepted)
        moved_s = self.move_s * len(batch.moves)
        return StepResult(batch.step, results, {}, self.seconds + moved_s, moved_s)

    def restart(self) -> None:
        self.restarts += 1
        self.lost = False
        self._reset()

    def _reset(self) -> None:
        self._rows = Rows()
        self.waiting: deque[Batch] = deque()
        self._kv, self._host = (
            [[-1] * self._config.block_size for _ in range(count)]
            for count in (self._config.num_blocks, self._config.num_host_blocks)
        )

    def _locate(self, block_ids: Sequence[int], position: int) -> tuple[int, int]:
        return block_ids[position // self._config.block_size], position % self._config.block_size

    def _read(self, block_ids: Sequence[int], position: int) -> int:
        block, slot = self._locate(block_ids, position)
        return self._kv[block][slot]


class StepClock:
    """A clock that only moves with steps, which run one after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self._free = 0.0
        self._ends: deque[tuple[float, float]] = deque()

    def begin(self, seconds: float) -> None:
        """A step of so many seconds begins, or waits behind those under way."""
        self._free = max(self._free, self.now) + seconds
        self._ends.append((self._free, seconds))

    def wait(self, timeout_s: float | None) -> float | None:
        """Waits for the end of the oldest step and returns its seconds; None if that takes longer than `timeout_s`."""
        end, seconds = self._ends[0]
        if timeout_s is not None and end > self.now + timeout_s:
            self.now += timeout_s
            return None
        self.now = max(self.now, end)
        self._ends.popleft()
        return seconds

    def stall(self, seconds: float) -> None:
        """Loses the steps under way, and time."""
        self._ends.clear()
        self.now += seconds
        self._free = self.now


class TimedExecutor(FakeExecutor):
    """A step takes `base` seconds and `per_token` for each of its tokens."""

    def __init__(self, config: EngineConfig, base: float, per_token: float) -> None:
        super().__init__(config)
        self.clock = StepClock()
        self.cost = (base, per_token)

    @property
    def now(self) -> float:
        return self.clock.now

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        self.clock.begin(self.cost[0] + self.cost[1] * count_tokens(batch) if batch.rows else 1e-5)

    def poll(self, timeout_s: float | None = None) -> StepResult | None:
        seconds = self.clock.wait(timeout_s)
        if seconds is None:
            return None
        result = super().poll()
        assert result is not None
        return replace(result, duration_s=seconds)


class InlineDrafter:
    """A drafter in the same process: n-grams, or the true continuation when it is an oracle."""

    def __init__(self, *, oracle: bool = False) -> None:
        self.incarnation = 0
        self.dead = False
        self.mute = False
        self._oracle = oracle
        self._model = NgramDrafter(min_ngram=1)
        self._tokens: dict[int, list[int]] = {}
        self._answers: dict[int, DraftResult] = {}

    def send(self, work: DraftWork) -> bool:
        if self.dead:
            return False
        result = self._model.run(work)
        if self._oracle:
            result = self._foresee(work)
        self._answers[work.number] = result
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        return None if self.dead or self.mute else self._answers.pop(number)

    def restart(self) -> None:
        self.dead = False
        self.incarnation += 1
        self._model = NgramDrafter(min_ngram=1)
        self._tokens.clear()

    def _foresee(self, work: DraftWork) -> DraftResult:
        from tailserve.engine.speculation.drafter import Draft

        drafts = {}
        for row in work.rows:
            tokens = self._tokens.get(row.row, [])[: row.keep] + row.token_ids
            self._tokens[row.row] = tokens
            drafts[row.row] = Draft(len(tokens), expected_answer(tokens, row.num_tokens))
        return DraftResult(work.number, drafts)


def engine_config(**changes: object) -> EngineConfig:
    defaults: dict[str, object] = {
        "classes": (CRITICAL, NORMAL),
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
        "num_blocks": 32,
        "block_size": 4,
    }
    return EngineConfig(**(defaults | changes))  # type: ignore[arg-type]


_numbers = itertools.count()


def make_request(prompt: Sequence[int], *, max_tokens: int = 8, slo_class: str = "normal", **fields: object) -> Request:
    sampling = {"max_tokens": max_tokens, "seed": 0, "temperature": 0.0}
    names = SamplingParams.__struct_fields__
    sampling |= {name: fields.pop(name) for name in list(fields) if name in names}
    return Request(
        id=str(fields.pop("id", f"r{next(_numbers)}")),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        slo_class=slo_class,
        **fields,  # type: ignore[arg-type]
    )


class Answers:
    """Collects chunks, and insists that every request ends once."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, TokenChunk] = {}

    def take(self, chunks: Sequence[TokenChunk]) -> None:
        for chunk in chunks:
            assert chunk.request_id not in self.ends, f"{chunk.request_id} goes on after its end"
            self.tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                self.ends[chunk.request_id] = chunk


def run_to_end(engine: Engine, answers: Answers | None = None, *, max_steps: int = 2000) -> Answers:
    answers = answers or Answers()
    for _ in range(max_steps):
        if not engine.has_work:
            return answers
        answers.take(engine.step())
    raise AssertionError(f"still at work after {max_steps} steps")
