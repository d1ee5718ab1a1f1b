"""Attention by the book, on any device: the oracle that other backends are compared with."""

from __future__ import annotations

import torch

from tailserve.engine.model.attention import KVCache, Options, PackedSequences

TILE = 512
"""Context positions that are read at a time: no sequence's whole context is ever gathered."""


def attend_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, context_len: int, options: Options
) -> torch.Tensor:
    """One sequence: query [n, heads, head_dim] at its last n positions, over blocks [blocks, kv_heads, size, head_dim].

    Softmax runs online over tiles of the context (Milakov and Gimelshein 2018), in float32. Returns float32
    [n, heads, head_dim].
    """
    length, heads, head_dim = query.shape
    kv_heads, size = keys.shape[1], keys.shape[2]
    groups = heads // kv_heads
    # Query heads of one KV head become rows of one matrix, so keys are never repeated.
    rows = query.float().view(length, kv_heads, groups, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    positions = torch.arange(context_len - length, context_len, device=query.device).repeat(groups)
    shape = (kv_heads, groups * length, 1)
    if options.sinks is None:
        peak = torch.full(shape, -torch.inf, device=query.device)
        total = torch.zeros(shape, device=query.device)
    else:
        peak = options.sinks.float().view(kv_heads, groups, 1).expand(-1, -1, length).reshape(shape)
        total = torch.ones(shape, device=query.device)
    out = torch.zeros((kv_heads, groups * length, head_dim), device=query.device)
    first = 0
    if options.sliding_window is not None:
        first = max(0, context_len - length - options.sliding_window + 1) // size * size
    for begin in range(first, context_len, TILE):
        end = min(begin + TILE, context_len)
        blocks = table[begin // size : -(-end // size)]
        tile_keys = keys[blocks].transpose(0, 1).flatten(1, 2)[:, : end - begin].float()
        tile_values = values[blocks].transpose(0, 1).flatten(1, 2)[:, : end - begin].float()
        scores = torch.bmm(rows, tile_keys.transpose(1, 2)).mul_(options.scaling)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        distance = positions.unsqueeze(1) - torch.arange(begin, end, device=query.device)
        hidden = distance < 0
        if options.sliding_window is not None:
            hidden |= distance >= options.sliding_window
        scores.masked_fill_(hidden, -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has peak -inf; exp(-inf - -inf) would be nan.
        anchor = new_peak.masked_fill(new_peak == -torch.inf, 0.0)
        weights = torch.exp(scores - anchor)
        decay = torch.exp(peak - anchor)
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + torch.bmm(weights, tile_values)
        peak = new_peak
    return (out / total).view(kv_heads, groups, length, head_dim).permute(2, 0, 1, 3).reshape(length, heads, head_dim)


class ReferenceBackend:
    """One sequence after the other, in float32 torch operations."""

    name = "reference"

    def attend(
        self, query: torch.Tensor, cache: KVCache, layer: int, sequences: PackedSequences, options: Options
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        tables = torch.from_numpy(sequences.block_tables).to(query.device)
        for index, context_len in enumerate(sequences.context_lens.tolist()):
            span = slice(int(sequences.query_starts[index]), int(sequences.query_starts[index + 1]))
            out[span] = attend_one(
                query[span], cache.keys[layer], cache.values[layer], tables[index], context_len, options
            ).to(query.dtype)
        return out
