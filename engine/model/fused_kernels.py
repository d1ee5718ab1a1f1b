"""What a decoder layer on CUDA does between its products, each in one Triton kernel."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(
    hidden, delta, weight, rows, out, epsilon, SIZE: tl.constexpr, WIDTH: tl.constexpr, HAS_DELTA: tl.constexpr,
    PICKS: tl.constexpr,
):  # fmt: skip
    """hidden [T, SIZE], float32, gets delta added if there is one; out [N, SIZE] is its root-mean-square norm.

    A program a row: of hidden, or with PICKS of `rows` [N], which stay as they are.
    """
    target = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + target).to(tl.int64) if PICKS else target
    columns = tl.arange(0, WIDTH)
    wide = columns < SIZE
    x = tl.load(hidden + row * SIZE + columns, mask=wide, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta + row * SIZE + columns, mask=wide, other=0.0).to(tl.float32)
        if not PICKS:
            tl.store(hidden + row * SIZE + columns, x, mask=wide)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / SIZE + epsilon)
    y = x * scale * tl.load(weight + columns, mask=wide, other=0.0).to(tl.float32)
    tl.store(out + target * SIZE + columns, y.to(out.dtype.element_ty), mask=wide)


@triton.jit
def _norms(query_norm, key_norm, is_query, columns, wide):
    """[heads, columns], the same for all queries and for all keys."""
    of_queries = tl.load(query_norm + columns, mask=wide, other=0.0).to(tl.float32)
    of_keys = tl.load(key_norm + columns, mask=wide, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_queries[None, :], of_keys[None, :])


@triton.jit
def split_heads(
    qkv, query_norm, key_norm, cosines, sines, positions, slots, query, keys, values, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr, HAS_NORMS: tl.constexpr,
):  # fmt: skip
    """Rotated queries [T, heads, head_dim] of qkv [T, heads + 2 kv_heads, head_dim]; rotated keys, and values, go to their
    slots [T] in [blocks, kv_heads, block_size, head_dim]. Program (token, AT_ONCE heads).

    Rotation is by halves of a head, with cosines and sines [positions, head_dim / 2], float32 (Su et al. 2021). With
    HAS_NORMS the root-mean-square norm of each query and key comes first.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    columns = tl.arange(0, WIDTH)
    wide = columns < HALF
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & wide[None, :]
    source = (token * (HEADS + 2 * KV_HEADS) + head)[:, None] * HEAD_DIM + columns[None, :]
    low = tl.load(qkv + source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(qkv + source + HALF, mask=inside, other=0.0).to(tl.float32)
    x, y = low, high
    if HAS_NORMS:
        scale = 1.0 / tl.sqrt(tl.sum(low * low + high * high, 1) / HEAD_DIM + epsilon)
        x = x * scale[:, None] * _norms(query_norm, key_norm, is_query, columns, wide)
        y = y * scale[:, None] * _norms(query_norm, key_norm, is_query, columns + HALF, wide)
    angle = tl.load(positions + token).to(tl.int64) * HALF + columns
    cosine = tl.load(cosines + angle, mask=wide, other=0.0)[None, :]
    sine = tl.load(sines + angle, mask=wide, other=0.0)[None, :]
    first, second = x * cosine - y * sine, y * cosine + x * sine
    kind = query.dtype.element_ty
    target = (token * HEADS + head)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(query + target, first.to(kind), mask=is_query[:, None] & wide[None, :])
    tl.store(query + target + HALF, second.to(kind), mask=is_query[:, None] & wide[None, :])
    slot = tl.load(slots + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    place = ((block * KV_HEADS + head - HEADS) * BLOCK_SIZE + offset)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(keys + place, first.to(kind), mask=is_key[:, None] & wide[None, :])
    tl.store(keys + place + HALF, second.to(kind), mask=is_key[:, None] & wide[None, :])
    place -= KV_HEADS * BLOCK_SIZE * HEAD_DIM
    tl.store(values + place, low.to(kind), mask=is_value[:, None] & wide[None, :])
    tl.store(values + place + HALF, high.to(kind), mask=is_value[:, None] & wide[None, :])


@triton.jit
def gate(gate_up, out, SIZE: tl.constexpr, AT_ONCE: tl.constexpr):
    """out [T, SIZE] = silu(gate) * up, of gate_up [T, 2 * SIZE]. Program (token, AT_ONCE columns)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    wide = columns < SIZE
    x = tl.load(gate_up + token * 2 * SIZE + columns, mask=wide, other=0.0).to(tl.float32)
    y = tl.load(gate_up + token * 2 * SIZE + SIZE + columns, mask=wide, other=0.0).to(tl.float32)
    tl.store(out + token * SIZE + columns, (x / (1.0 + tl.exp(-x)) * y).to(out.dtype.element_ty), mask=wide)
