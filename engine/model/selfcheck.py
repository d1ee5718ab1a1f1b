"""Compares a model in a packed batch with the same model as transformers runs it by itself.

Packed batches go wrong silently: masks that are not built, windows and caps that a backend forgets, positions shared
between neighbours. So two sequences are compared whenever a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from tailserve.engine.errors import UnsupportedModelError
from tailserve.engine.model.paged import PagedModel, Span

WINDOW = 16
"""Sliding windows shrink to this for the check, so that a sequence longer than the window is cheap."""
_LENGTHS = (9, 41)
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest difference of a logit, as a multiple of the standard deviation of the logits."""


@torch.inference_mode()
def eager_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits [length, vocab] of the probe sequences, each by itself, through the model's own eager attention."""
    with _short_windows(model):
        return [
            model(input_ids=torch.tensor([probe], device=model.device), use_cache=False).logits[0].float()
            for probe in _probes(model)
        ]


def check_packed(paged: PagedModel, expected: list[torch.Tensor]) -> None:
    """Runs the probes side by side through the paged path, the longer in two chunks. Uses the cache's first blocks.

    Raises UnsupportedModelError with the size of the difference where they do not agree.
    """
    size = paged.cache.block_size
    short, long = _probes(paged.model)
    tables = [list(range(-(-len(short) // size))), []]
    tables[1] = list(range(len(tables[0]), len(tables[0]) - (-len(long) // size)))
    cut = len(long) // 2
    with _short_windows(paged.model):
        first = paged.forward([Span(short, 0, tables[0], len(short)), Span(long[:cut], 0, tables[1], cut)])
        # The last three tokens arrive as a draft would: several queries behind a cached context.
        middle = paged.forward([Span(long[cut:-3], cut, tables[1], len(long) - cut - 3)])
        last = paged.forward([Span(long[-3:], len(long) - 3, tables[1], 3)])
    actual = [first[: len(short)], torch.cat([first[len(short) :], middle, last])]
    tolerance = _TOLERANCE[paged.model.dtype]
    for want, got in zip(expected, actual, strict=True):
        worst = (want - got).abs().amax(-1) / want.std()
        # Where types round, a near-tie (between experts, say) may flip at a few positions: a wrong mask or window shows at
        # every late one.
        error = (worst.max() if want.dtype == paged.model.dtype else worst[len(worst) // 2 :].median()).item()
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{paged.model.config.model_type}: in a packed batch this model's logits are off by {error:.3g} standard "
                f"deviations ({tolerance:g} allowed) from its own eager attention; it would answer wrongly, so it is refused"
            )


def _probes(model: PreTrainedModel) -> list[list[int]]:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(20)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in _LENGTHS]


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    config = model.config.get_text_config(decoder=True)
    owners: list[Any] = [o for o in (config, *model.modules()) if isinstance(getattr(o, "sliding_window", None), int)]
    windows = [owner.sliding_window for owner in owners]
    for owner in owners:
        owner.sliding_window = WINDOW
    try:
        yield
    finally:
        for owner, window in zip(owners, windows, strict=True):
            owner.sliding_window = window
