"""What a step costs the router itself: schedule, encode, decode, commit, publish.

Run: python tests/benchmarks/router_step.py

Everything but waiting for the model processes, whose answers are made beforehand. Prints one line for each number of
running sequences, and the bytes of a step's messages at a short and a long context. Writes JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import deque
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fakes import engine_config, make_request

from tailserve.deployments.collector import keep_collector_out_of_steps
from tailserve.deployments.streams import Outboxes
from tailserve.engine.engine import Engine
from tailserve.engine.speculation.drafter import Draft, DraftResult, DraftWork
from tailserve.engine.stats import InstanceLoad
from tailserve.engine.types import Batch, StepResult

NUM_DRAFTS = 4


class InstantExecutor:
    """Encodes and decodes as a channel does; the verifier's work between the two is not on the clock."""

    lost = False

    def __init__(self) -> None:
        self.waited = 0.0
        self.sent: list[int] = []
        self._results: deque[bytes] = deque()

    def submit(self, batch: Batch) -> None:
        data = msgspec.msgpack.encode(batch)
        self.sent.append(len(data))
        begin = time.perf_counter()
        tokens = [
            [7] * (1 + len(batch.drafts.get(row, ())) // 2) if samples else []
            for row, samples in zip(batch.rows, batch.samples, strict=True)
        ]
        self._results.append(msgspec.msgpack.encode(StepResult(batch.step, tokens, {}, 0.0)))
        self.waited += time.perf_counter() - begin

    def poll(self, timeout_s: float | None = None) -> StepResult:
        return msgspec.msgpack.decode(self._results.popleft(), type=StepResult)

    def restart(self) -> None:
        raise NotImplementedError


class InstantDrafter:
    incarnation = 0

    def __init__(self) -> None:
        self.waited = 0.0
        self.sent: list[int] = []

    def send(self, work: DraftWork) -> bool:
        self.sent.append(len(msgspec.msgpack.encode(work)))
        begin = time.perf_counter()
        drafts = {row.row: Draft(row.keep + len(row.token_ids), [7] * NUM_DRAFTS) for row in work.rows}
        self._result = msgspec.msgpack.encode(DraftResult(work.number, drafts))
        self.waited += time.perf_counter() - begin
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        return msgspec.msgpack.decode(self._result, type=DraftResult)


async def measure(num_running: int, context: int, *, speculate: bool, steps: int) -> dict[str, float]:
    config = engine_config(
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * (NUM_DRAFTS + 1) + 512,
        max_model_len=context + steps * 5 + 80,
        num_blocks=num_running * ((context + steps * 5) // 16 + 10),
        block_size=16,
    )
    executor, drafter = InstantExecutor(), InstantDrafter()
    engine = Engine(config, executor, drafter if speculate else None)
    outboxes = Outboxes()
    outboxes.open_request("ingress")
    for n in range(num_running):
        # Lengths differ, as users' do: not all sequences need their next block in the same step.
        engine.add(make_request([n % 50 + 1] * (context + n % 16), max_tokens=10**6))
    while any(seq.num_pending > 1 for seq in engine.scheduler.residency.running) or engine.scheduler.residency.waiting:
        engine.step()
    for line in (executor.sent, drafter.sent):
        line.clear()
    times = []
    for _ in range(steps):
        executor.waited = drafter.waited = 0.0
        begin = time.perf_counter()
        chunks = engine.step()
        outboxes.publish({"ingress": chunks}, InstanceLoad(0, {"critical": 0.0, "normal": 0.0}, 0.0))
        times.append(time.perf_counter() - begin - executor.waited - drafter.waited)
        await asyncio.sleep(0)
    p50, p99 = np.percentile(np.array(times) * 1e3, [50, 99])
    sent = np.array(executor.sent) + np.array(drafter.sent[: len(executor.sent)] if speculate else 0)
    return {"running": num_running, "context": context, "p50_ms": p50, "p99_ms": p99, "bytes_p50": float(np.median(sent))}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    keep_collector_out_of_steps()
    print(f"{'running':>8} {'context':>8} {'drafts':>7} {'p50 ms':>8} {'p99 ms':>8} {'bytes p50':>10}")
    for num_running, context in ((1, 64), (32, 64), (32, 4000), (1024, 64), (1024, 512)):
        for speculate in (False, True):
            row = await measure(num_running, context, speculate=speculate, steps=120)
            rows.append(row | {"drafts": NUM_DRAFTS if speculate else 0})
            print(
                f"{num_running:>8} {context:>8} {rows[-1]['drafts']:>7} {row['p50_ms']:>8.3f} {row['p99_ms']:>8.3f} "
                f"{row['bytes_p50']:>10.0f}"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
