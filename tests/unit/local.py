"""The whole engine in one process: real models, no Ray, no channels."""

from __future__ import annotations

from collections.abc import Iterator

from fakes import engine_config

from tailserve.engine.engine import Engine
from tailserve.engine.model.draft import ModelDrafter
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.options import LoadOptions, spare_blocks
from tailserve.engine.speculation.drafter import DraftModel, DraftResult, DraftWork
from tailserve.engine.speculation.ngram import NgramDrafter
from tailserve.engine.types import ModelInfo


class LocalDrafter:
    incarnation = 0

    def __init__(self, model: DraftModel) -> None:
        self._model = model

    def send(self, work: DraftWork) -> bool:
        self._result = self._model.run(work)
        return True

    def receive(self, number: int, timeout_s: float) -> DraftResult | None:
        return self._result


class Models:
    """Loads models once and makes engines over them."""

    def __init__(self, path: str, **options: object) -> None:
        self.path = path
        self.options = options
        self.paged, self.info = self._load(num_spare_blocks=spare_blocks(int(options.get("block_size", 16))))  # type: ignore[call-overload]
        self._drafts: dict[float, tuple[PagedModel, ModelInfo]] = {}

    def engine(self, draft: str | float = "none", *, block: bool = False, **config: object) -> Engine:
        """`draft`: none, ngram, or a draft model: the verifier's weights with that much noise. `block`: verification."""
        return self.engine_with(self._drafter(draft), block=block, **config)

    def engine_with(self, drafter: LocalDrafter | None, *, block: bool = False, **config: object) -> Engine:
        """With a drafter of the test's own."""
        settings = engine_config(
            **(
                {
                    "max_model_len": self.info.max_model_len,
                    "num_blocks": self.info.num_blocks,
                    "block_size": self.info.block_size,
                    "max_num_seqs": 32,
                    "max_num_batched_tokens": 128,
                }
                | config
            )
        )
        executor = LocalExecutor(
            self.paged,
            block_verification=block,
            num_blocks=self.info.num_blocks,
            num_host_blocks=settings.num_host_blocks,
        )
        return Engine(settings, executor, drafter)

    def _drafter(self, draft: str | float) -> LocalDrafter | None:
        if draft == "none":
            return None
        if draft == "ngram":
            return LocalDrafter(NgramDrafter())
        assert isinstance(draft, float)
        if draft not in self._drafts:
            self._drafts[draft] = self._load(noise=draft)
        model, info = self._drafts[draft]
        return LocalDrafter(ModelDrafter(model, max_num_batched_tokens=64, max_model_len=info.max_model_len))

    def _load(self, **more: object) -> tuple[PagedModel, ModelInfo]:
        return load_model(LoadOptions(path=self.path, **({"dtype": "float32"} | self.options | more)))  # type: ignore[arg-type]


def prompts(count: int, vocab: int, *, longest: int = 60) -> Iterator[list[int]]:
    """Varied prompts: short and long, random and repetitive."""
    import random

    source = random.Random(7)
    for index in range(count):
        length = source.randint(1, longest)
        period = source.randint(2, 6) if index % 3 == 0 else length
        base = [source.randrange(3, vocab) for _ in range(period)]
        yield [base[position % period] for position in range(length)]
