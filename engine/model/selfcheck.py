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
from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.spans import Span

WINDOW = 16
"""Sliding windows shrink to this for the check, so that a sequence longer than the window is cheap."""
_LENGTHS = (9, 41)
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
"""Difference of the logits as a multiple of their standard deviation: the largest one in float32, else the root mean square
of the typical position."""
_QUANTIZED_TOLERANCE = 0.5
"""A wrong mask makes it 1 and more."""


@torch.inference_mode()
def eager_logits(model: PreTrainedModel, *, window: int | None = WINDOW) -> list[torch.Tensor]:
    """Logits [length, vocab] of the probe sequences, each by itself, through the model's own eager attention; with sliding
    windows of so many positions, or those that the model has."""
    with _windows(window, model):
        return [
            model(input_ids=torch.tensor([probe], device=model.device), use_cache=False).logits[0].float()
            for probe in _probes(model)
        ]


def check_packed(
    paged: PagedModel,
    model: PreTrainedModel,
    expected: list[torch.Tensor],
    *,
    quantized: bool = False,
    window: int | None = WINDOW,
) -> None:
    """Runs the probes side by side through the paged path, the longer in two chunks. Uses the cache's first blocks.

    `model` is the one that `expected` comes from, and `window` that of `eager_logits`.

    Raises UnsupportedModelError with the size of the difference where they do not agree.
    """
    size = paged.block_size
    short, long = _probes(model)
    tables = [list(range(-(-len(short) // size))), []]
    tables[1] = list(range(len(tables[0]), len(tables[0]) - (-len(long) // size)))
    cut = len(long) // 2
    with _windows(window, model, paged):
        # Logits may be valid until the next call only.
        first = paged.forward([Span(short, 0, tables[0], len(short)), Span(long[:cut], 0, tables[1], cut)]).clone()
        # The last three tokens arrive as a draft would: several queries behind a cached context.
        middle = paged.forward([Span(long[cut:-3], cut, tables[1], len(long) - cut - 3)]).clone()
        last = paged.forward([Span(long[-3:], len(long) - 3, tables[1], 3)])
    actual = [first[: len(short)], torch.cat([first[len(short) :], middle, last])]
    tolerance = _QUANTIZED_TOLERANCE if quantized else _TOLERANCE[model.dtype]
    for want, got in zip(expected, actual, strict=True):
        difference = (want - got) / want.std()
        if model.dtype == torch.float32 and not quantized:
            error = difference.abs().max().item()
        else:
            # Other arithmetic rounds elsewhere, and a near-tie (between experts, say) may flip at a few positions: a wrong
            # mask or window shows at every late one.
            error = difference.square().mean(-1).sqrt()[len(want) // 2 :].median().item()
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{model.config.model_type}: in a packed batch this model's logits are off by {error:.3g} standard "
                f"deviations ({tolerance:g} allowed) from its own eager attention; it would answer wrongly, so it is refused"
            )


def _probes(model: PreTrainedModel) -> list[list[int]]:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(20)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in _LENGTHS]


@contextmanager
def _windows(window: int | None, *models: Any) -> Iterator[None]:
    if window is None:
        yield
        return
    modules = [part for model in models if isinstance(model, PreTrainedModel) for part in model.modules()]
    configs = [model.config.get_text_config(decoder=True) for model in models if isinstance(model, PreTrainedModel)]
    owners = [o for o in (*configs, *modules, *models) if isinstance(getattr(o, "sliding_window", None), int)]
    windows = [owner.sliding_window for owner in owners]
    for owner in owners:
        owner.sliding_window = window
    try:
        yield
    finally:
        for owner, window in zip(owners, windows, strict=True):
            owner.sliding_window = window
