"""The verifier's hidden states over a corpus, on disk: read once, learnt from many times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from tailserve.engine.distill.corpus import Example
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

TOKENS_AT_ONCE = 512


class StateFile:
    """Hidden states [tokens, width] of all examples, one after the other, in bfloat16."""

    def __init__(self, path: Path, examples: Sequence[Example], width: int) -> None:
        self._starts = np.cumsum([0] + [len(example.token_ids) for example in examples])
        self._path, self.width = path, width
        path.touch()

    def of(self, index: int) -> torch.Tensor:
        """[tokens of the example, width] bfloat16."""
        begin, end = int(self._starts[index]), int(self._starts[index + 1])
        part = np.fromfile(self._path, np.int16, (end - begin) * self.width, offset=2 * begin * self.width)
        return torch.from_numpy(part).view(torch.bfloat16).view(-1, self.width)

    def fill(self, options: LoadOptions, layers: Sequence[int], examples: Sequence[Example]) -> None:
        """Computes what the file lacks, example by example."""
        have = self._path.stat().st_size // (2 * self.width)
        first = int(np.searchsorted(self._starts, have, "right")) - 1
        if first == len(examples):
            return
        longest = max(len(example.token_ids) for example in examples)
        options = msgspec.structs.replace(options, max_model_len=longest, num_blocks=4 * longest // 16 + 64)
        model, info = load_model(options)
        model.tap(layers)
        with self._path.open("r+b") as file:
            file.truncate(2 * self.width * int(self._starts[first]))
            file.seek(0, 2)
            with tqdm(total=int(self._starts[-1]), initial=int(self._starts[first]), desc="states", unit="tok") as bar:
                for example in examples[first:]:
                    ids = example.token_ids
                    for begin in range(0, len(ids), TOKENS_AT_ONCE):
                        model.forward([Span(ids[begin : begin + TOKENS_AT_ONCE], begin, range(info.num_blocks), 0)])
                        assert model.features is not None
                        file.write(model.features.bfloat16().view(torch.int16).numpy().tobytes())
                    bar.update(len(ids))
