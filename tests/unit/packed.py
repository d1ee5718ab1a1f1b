"""Three sequences through a paged model, in odd chunks beside each other, over shuffled blocks."""

from __future__ import annotations

import torch

from tailserve.engine.model.paged import PagedModel
from tailserve.engine.model.spans import Span

LENGTHS = (5, 70, 33)
CUTS = ([0, 2, 5], [0, 41, 70], [0, 30, 33])


def run_in_chunks(paged: PagedModel, vocab: int) -> list[tuple[list[int], torch.Tensor]]:
    """Each sequence with its logits [length, vocab]. Needs 64 blocks."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(64, generator=generator).tolist()
    sequences = [torch.randint(vocab, (length,), generator=generator).tolist() for length in LENGTHS]
    tables = [order[0:1], order[1:10], order[10:15]]
    rows: list[list[torch.Tensor]] = [[], [], []]
    for turn in range(2):
        spans = [
            Span(tokens[cut[turn] : cut[turn + 1]], cut[turn], table, cut[turn + 1] - cut[turn])
            for tokens, table, cut in zip(sequences, tables, CUTS, strict=True)
        ]
        # Logits may be valid until the next call only.
        logits = paged.forward(spans).clone().split([span.num_logits for span in spans])
        for row, part in zip(rows, logits, strict=True):
            row.append(part)
    return [(tokens, torch.cat(row)) for tokens, row in zip(sequences, rows, strict=True)]
