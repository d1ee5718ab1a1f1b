"""An engine whose steps take 10 ms and 1 ms a token, and when its requests get their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from fakes import TimedExecutor, engine_config, make_request

from tailserve.engine.engine import Engine
from tailserve.engine.types import Request, SloClass

BASE, PER_TOKEN = 0.010, 0.001
CRITICAL = SloClass(name="critical", priority=0, ttft_s=0.5, tpot_s=0.04, speculation="off")
NORMAL = SloClass(name="normal", priority=10, ttft_s=5.0, tpot_s=0.2, speculation="off")


class Run:
    """An engine, and when each of its requests got its tokens."""

    def __init__(self, *, base: float = BASE, per_token: float = PER_TOKEN, **config: object) -> None:
        sizes: dict[str, object] = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 1024}
        sizes |= {"num_blocks": 8192, "block_size": 8, "classes": (CRITICAL, NORMAL)}
        settings = engine_config(**(sizes | config))
        self.executor = TimedExecutor(settings, base, per_token)
        profile = tuple((size, base + per_token * size) for size in (1, 8, 64, 128))
        self.engine = Engine(
            engine_config(**(sizes | config), step_profile=profile), self.executor, clock=lambda: self.executor.now
        )
        self.arrivals: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}

    @property
    def now(self) -> float:
        return self.executor.now

    def add(self, slo_class: str, num_prompt: int, num_output: int, **fields: object) -> Request:
        request = make_request([1] * num_prompt, max_tokens=num_output, slo_class=slo_class, **fields)
        self.arrivals[request.id] = self.now
        self.times[request.id] = []
        self.engine.add(request)
        return request

    def run(self, until: Callable[[], bool] | None = None) -> None:
        while self.engine.has_work and not (until and until()):
            for chunk in self.engine.step():
                self.times[chunk.request_id] += [self.now] * len(chunk.token_ids)

    def ttft(self, request: Request) -> float:
        return self.times[request.id][0] - self.arrivals[request.id]

    def tpot(self, request: Request) -> float:
        times = self.times[request.id]
        return (times[-1] - times[0]) / (len(times) - 1)

    def gaps(self, request: Request) -> list[float]:
        times = self.times[request.id]
        return [after - before for before, after in pairwise(times)]


def add_all(run: Run, slo_class: str, count: int, num_prompt: int, num_output: int, **fields: object) -> list[Request]:
    return [run.add(slo_class, num_prompt, num_output, **fields) for _ in range(count)]


def generating(run: Run, requests: Iterable[Request]) -> Callable[[], bool]:
    return lambda: all(run.times[request.id] for request in requests)
