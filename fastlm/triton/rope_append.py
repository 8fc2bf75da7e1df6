"""rope_append: a decoding step's queries and keys normalised, rotated; keys and values stored.

Computes   out = turn(norm(q), p), k_cache[p] = turn(norm(k), p), v_cache[p] = v for the new tokens,
           token t of sequence b at p = lengths[b] - tokens + t; turn as in rope.py
Algorithm  one program a token and block of heads, of q or of k and v; it looks up the token's place
           itself, so that no number leaves the device. A place outside of the cache or the tables
           is left alone, its row of out is zero
Tile       [heads x pairs] and what is not rotated beside it; a head lies whole in its program
Traffic    reads q, k, v once, writes out and the new rows of the caches once
Numerics   fp32 from the load to one rounding
Source     arXiv:2104.09864; norms of heads: arXiv:2302.05442
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton._configs import select
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import ceil_div, dense, power_of_two
from fastlm.triton.rope import _angles, _in_order, _unit

_MOST = 2**62


@triton.jit
def _scaled(x, weight, col, count, factor, offset):
    w = tl.load(weight + col, mask=col < count, other=0.0).to(tl.float32) + offset
    return x * factor * w


@triton.jit
def _turn(
    x, y, known, weight, cos, sin, row, heads, x_head, y_head, half, size, eps, offset,
    FULL: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, BLANK: tl.constexpr,
):  # fmt: skip
    """Some heads of one token; where its place is not known, zeros with BLANK, else nothing."""
    x += row * x_head
    y += row * y_head
    mine = row < heads
    written = mine if BLANK else mine & known
    total = tl.zeros([HEADS, 1], tl.float32)
    pair = tl.arange(0, HALF)[None, :] if HALF > 0 else 0
    rest = 2 * half + tl.arange(0, REST)[None, :] if REST > 0 else 0
    if HALF > 0:
        if INTERLEAVED:
            both = tl.arange(0, 2 * HALF)[None, :]
            z = tl.load(x + both, mask=mine & (both < 2 * half), other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(z, [HEADS, HALF, 2]))
            first, second = 2 * pair, 2 * pair + 1
        else:
            first, second = pair, half + pair
            x1 = tl.load(x + first, mask=mine & (pair < half), other=0.0).to(tl.float32)
            x2 = tl.load(x + second, mask=mine & (pair < half), other=0.0).to(tl.float32)
        total += tl.sum(x1 * x1 + x2 * x2, 1, keep_dims=True)
    if REST > 0:
        x3 = tl.load(x + rest, mask=mine & (rest < size), other=0.0).to(tl.float32)
        total += tl.sum(x3 * x3, 1, keep_dims=True)
    if weight is not None:
        factor = tl.rsqrt(total / size + eps)
        if HALF > 0:
            x1 = _scaled(x1, weight, first, 2 * half, factor, offset)
            x2 = _scaled(x2, weight, second, 2 * half, factor, offset)
        if REST > 0:
            x3 = _scaled(x3, weight, rest, size, factor, offset)
    if HALF > 0:
        cos1, cos2 = _angles(cos, half, FULL, INTERLEAVED, HALF)
        sin1, sin2 = _angles(sin, half, FULL, INTERLEAVED, HALF)
        y1 = tl.where(known, x1 * cos1 - x2 * sin1, 0.0)
        y2 = tl.where(known, x2 * cos2 + x1 * sin2, 0.0)
        if INTERLEAVED:
            z = tl.reshape(tl.join(y1, y2), [HEADS, 2 * HALF])
            both = tl.arange(0, 2 * HALF)[None, :]
            tl.store(y + both, z, mask=written & (both < 2 * half))
        else:
            tl.store(y + first, y1, mask=written & (pair < half))
            tl.store(y + second, y2, mask=written & (pair < half))
    if REST > 0:
        tl.store(y + rest, tl.where(known, x3, 0.0), mask=written & (rest < size))


@kernel(do_not_specialize=["tokens", "length", "places", "table_pages", "pages", "num_keys"])
def _append(
    q, k, v, cos, sin, k_cache, v_cache, lengths, table, q_weight, k_weight, out,
    tokens, length, places, num_keys, table_pages, pages, table_row,
    q_heads, kv_heads, size, value_size, half,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token, kc_row, kc_head, kc_token, vc_row, vc_head, vc_token,
    cos_row, sin_row, eps, offset,
    FULL: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    if lengths is not None:
        p = tl.load(lengths + batch).to(tl.int64) - tokens + token
    else:
        p = token + length - tokens
    known = (p >= 0) & (p < places)
    if table is not None:
        known = known & (p // num_keys < table_pages)
        row = tl.load(table + batch * table_row + p // num_keys, mask=known, other=-1).to(tl.int64)
        known = known & (row >= 0) & (row < pages)
        p_row = p % num_keys
    else:
        known = known & (p < num_keys)
        row = batch
        p_row = p
    p = tl.where(known, p, 0)
    p_row = tl.where(known, p_row, 0)
    row = tl.where(known, row, 0)
    if HALF > 0:
        cos += p * cos_row
        sin += p * sin_row
    block = tl.program_id(1)
    of_q = tl.cdiv(q_heads, HEADS)
    if block < of_q:
        head = (block * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        _turn(
            q + batch * q_batch + token * q_token, out + batch * out_batch + token * out_token,
            known, q_weight, cos, sin, head, q_heads, q_head, out_head, half, size, eps, offset,
            FULL, INTERLEAVED, HEADS, HALF, REST, True,
        )  # fmt: skip
    else:
        head = ((block - of_q) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        _turn(
            k + batch * k_batch + token * k_token, k_cache + row * kc_row + p_row * kc_token,
            known, k_weight, cos, sin, head, kv_heads, k_head, kc_head, half, size, eps, offset,
            FULL, INTERLEAVED, HEADS, HALF, REST, False,
        )  # fmt: skip
        col = tl.arange(0, BDV)[None, :]
        inside = (head < kv_heads) & (col < value_size) & known
        x = tl.load(v + batch * v_batch + token * v_token + head * v_head + col, mask=inside)
        tl.store(v_cache + row * vc_row + p_row * vc_token + head * vc_head + col, x, mask=inside)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    length: int,
    table: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: int,
    interleaved: bool,
    eps: float,
    offset: float,
) -> Tensor:
    """The operator of this name."""
    if not _fits(q, k, v, cos, sin, k_cache, v_cache, lengths, table, q_weight, k_weight, rotary):
        raise RuntimeError("rope_append: the arguments do not fit each other")
    out = _in_order(q)
    q, k, v = _unit(q), _unit(k), _unit(v)
    batch, q_heads, tokens, size = q.shape
    kv_heads, value_size = v.shape[1], v.shape[3]
    cos, sin = (None if t is None else _unit(t) for t in (cos, sin))
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    half, rest = rotary // 2, size - rotary
    pairs, others = (power_of_two(n) if n else 0 for n in (half, rest))
    values = power_of_two(max(value_size, 1))
    config = select("rope", max(pairs, others, values), q.get_device())
    width = max(pairs + others // 2, values // 2, 1)
    heads = min(power_of_two(max(q_heads, kv_heads)), max(config.tile[0] // width, 1))
    _append(
        (batch * tokens, ceil_div(q_heads, heads) + ceil_div(kv_heads, heads), 1),
        (q, k, v, cos, sin, k_cache, v_cache, dense(lengths), table, dense(q_weight),
         dense(k_weight), out),
        (
            tokens,
            length,
            _MOST if cos is None else cos.shape[0],
            k_cache.shape[2],
            0 if table is None else table.shape[1],
            k_cache.shape[0],
            0 if table is None else table.stride(0),
            q_heads,
            kv_heads,
            size,
            value_size,
            half,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            eps,
            offset,
        ),
        config,
        FULL=cos is not None and cos.shape[-1] == rotary,
        INTERLEAVED=interleaved,
        HEADS=heads,
        HALF=pairs,
        REST=others,
        BDV=values,
    )  # fmt: skip
    return out


def _fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    table: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: int,
) -> bool:
    """What keeps the kernel from touching the wrong memory; the facade words it better."""
    batch, _, tokens, size = q.shape
    heads, value_size, keys = v.shape[1], v.shape[3], k_cache.shape[2]
    rows = batch if table is None else k_cache.shape[0]
    angles = (rotary, rotary // 2) if rotary else ()
    return (
        all(t.dtype == q.dtype for t in (k, v, k_cache, v_cache))
        and k.shape == (batch, heads, tokens, size)
        and v.shape[0] == batch
        and v.shape[2] == tokens
        and k_cache.shape == (rows, heads, keys, size)
        and v_cache.shape == (rows, heads, keys, value_size)
        and all(t.shape[3] <= 1 or t.stride(3) == 1 for t in (k_cache, v_cache))
        and 0 <= rotary <= size
        and rotary % 2 == 0
        and (cos is None) == (sin is None) == (rotary == 0)
        and (cos is None or sin is None or (cos.dim() == 2 and cos.shape == sin.shape))
        and (cos is None or cos.shape[1] in angles)
        and (lengths is None or lengths.shape == (batch,))
        and (table is None or (table.dim() == 2 and table.shape[0] == batch))
        and all(t is None or t.shape == (size,) for t in (q_weight, k_weight))
        and all(
            t is None or t.device == q.device
            for t in (k, v, cos, sin, k_cache, v_cache, lengths, table, q_weight, k_weight)
        )
    )


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    q = torch.empty(32, 1, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty(32, 1, 8, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    cache, pages = q.new_empty(32, 8, 4096, 128), q.new_empty(4096, 8, 16, 128)
    angles = q.new_empty(8192, 64, dtype=torch.float32)
    lengths, table = (q.new_empty(n, dtype=torch.int32) for n in ((32,), (32, 256)))
    weight, none = angles.new_empty(128), (None, None)
    plain: tuple[Any, ...]
    plain = (q, k, k, angles, angles, cache, cache, lengths, 0, None, *none, 128, False, 1e-6, 0.0)
    yield "rope_append", partial(rope_append, *plain)
    more: tuple[Any, ...] = (lengths, 0, table, weight, weight, 64, True, 1e-6, 1.0)
    full = partial(rope_append, q, k, k, angles, angles, pages, pages, *more)
    yield "rope_append pages, norms, partial", full
    still: tuple[Any, ...] = (lengths.long(), 0, None, *none, 0, False, 1e-6, 0.0)
    yield "rope_append still", partial(rope_append, q, k, k, *none, cache, cache, *still)
