"""decode_attention.

Computes   out_i = sum_j softmax_j(s_ij) v_j over the first lengths[b] keys
Algorithm  the keys are cut into pieces by the size of the cache, not by lengths, which only the
           device knows: one program a piece and head of keys, whose queries are rows of one
           product; a second kernel joins the pieces of a row in ascending order
Tile       [queries of all heads of a group, keys]; keys of pages row by row through block_table
Traffic    keys and values up to the length once, one row of partial results a piece
Numerics   fp32 scores and sums; weights rounded to the element type before they meet v. The cut
           depends on the cache's size alone: a sequence has the same bits alone as in a batch
Source     Dao et al., "Flash-Decoding for long-context inference", 2023
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton import _configs
from fastlm.triton._attention_tiles import LOG2E, power
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import ceil_div, power_of_two, tanh

_PIECE = 256  # keys of a piece of a cache of up to _PIECE * _PIECES keys; larger ones in _PIECES
_PIECES = 64
_ROWS = 64  # of a product at most

UNSPECIALIZED = ("length", "num_keys", "window", "piece", "pieces", "queries", "mask_row")


@triton.jit
def _rows_of(pointer, at, seen, C: tl.constexpr, BC: tl.constexpr):
    """The rows of keys or values that start at `at`, where seen."""
    cols = tl.arange(0, BC)[None, :]
    where = pointer + at[:, None] + cols
    if C != BC:
        return tl.load(where, mask=seen[:, None] & (cols < C), other=0)
    return tl.load(where, mask=seen[:, None], other=0)


@kernel(do_not_specialize=UNSPECIALIZED)
def decode_pieces(
    q, k, v, out, part, stats, lengths, table, mask, slopes, sinks, k_scale, v_scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, table_batch, mask_batch, mask_head, mask_row, mask_col,
    k_scale_batch, k_scale_head, k_scale_row, v_scale_batch, v_scale_head, v_scale_row,
    slopes_batch, length, num_keys, window, piece, pieces, kv_heads, groups, queries, page,
    unit, cap_in, cap_out,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr,
    DIRECT: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    head_k = tl.program_id(1) % kv_heads
    block = tl.program_id(1) // kv_heads  # of rows, where one product does not hold them
    batch = tl.program_id(2)
    wide = batch.to(tl.int64)
    wide_head = head_k.to(tl.int64)
    if lengths is not None:
        length = tl.load(lengths + batch).to(tl.int32)
    factor: tl.constexpr = 1.0 if NATURAL else LOG2E

    r = block * BM + tl.arange(0, BM)
    rows = groups * queries
    head = head_k * groups + r // queries
    i = r % queries
    p = length - queries + i
    valid = r < rows
    at = q + wide * q_batch + head.to(tl.int64) * q_head + i.to(tl.int64) * q_row
    d = tl.arange(0, BD)[None, :]
    x = tl.load(at[:, None] + d, mask=valid[:, None] & (d < D), other=0.0)
    slope = tl.zeros([BM], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + batch * slopes_batch + head, mask=valid, other=0.0) * factor
    m = tl.full([BM], float("-inf"), tl.float32)
    z = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)

    first = number * piece
    last = tl.minimum(tl.minimum(length, num_keys), first + piece)
    if WINDOW:
        first = tl.maximum(first, tl.maximum(length - queries - window + 1, 0) // BN * BN)
    for start in range(first, last, BN):
        j = start + tl.arange(0, BN)
        seen = j < last
        if PAGED:
            name = tl.load(table + wide * table_batch + j // page, mask=seen, other=0)
            group, slot = name.to(tl.int64), (j % page).to(tl.int64)
        else:
            group, slot = tl.zeros([BN], tl.int64) + wide, j.to(tl.int64)
        place = group * k_batch + wide_head * k_head + slot * k_row
        keys = _rows_of(k, place, seen, D, BD)
        if SCALED:
            keys = keys.to(tl.float32)  # on the way from int8 to halves
        keys = keys.to(x.dtype)
        s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
        if SCALED:
            place = group * k_scale_batch + wide_head * k_scale_head + slot * k_scale_row
            s *= tl.load(k_scale + place, mask=seen, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            s = tanh(s * cap_in) * cap_out
        else:
            s *= unit
        ahead = j[None, :] - p[:, None]
        if ALIBI:
            s += slope[:, None] * ahead.to(tl.float32)
        sees = seen[None, :] & (ahead <= 0) & valid[:, None]
        if WINDOW:
            sees &= ahead > -window
        if MASK > 0:
            where = mask + wide * mask_batch + head.to(tl.int64)[:, None] * mask_head
            where += i.to(tl.int64)[:, None] * mask_row + j.to(tl.int64)[None, :] * mask_col
            more = tl.load(where, mask=seen[None, :] & valid[:, None], other=0)
            if MASK == 1:
                sees &= more != 0
            else:
                s += more.to(tl.float32)
        s = tl.where(sees, s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weights = power(s - base[:, None], NATURAL)
        shrink = power(m - base, NATURAL)
        z = z * shrink + tl.sum(weights, 1)
        m = largest
        place = group * v_batch + wide_head * v_head + slot * v_row
        values = _rows_of(v, place, seen, DV, BDV)
        if SCALED:
            values = values.to(tl.float32)
            place = group * v_scale_batch + wide_head * v_scale_head + slot * v_scale_row
            weights *= tl.load(v_scale + place, mask=seen, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(
            weights.to(x.dtype),
            values.to(x.dtype),
            acc * shrink[:, None],
            input_precision=PRECISION,
        )

    dv = tl.arange(0, BDV)[None, :]
    inside = valid[:, None] & (dv < DV)
    if DIRECT:
        if SINKS:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * factor
            largest = tl.maximum(m, sink)
            base = tl.where(largest == float("-inf"), 0.0, largest)
            shrink = power(m - base, NATURAL)
            z = z * shrink + power(sink - base, NATURAL)
            acc *= shrink[:, None]
        y = acc / tl.where(z == 0.0, 1.0, z)[:, None]
        at = out + wide * out_batch + head.to(tl.int64) * out_head + i.to(tl.int64) * out_row
        tl.store(at[:, None] + dv, y.to(out.dtype.element_ty), mask=inside)
    else:
        row = ((wide * kv_heads + wide_head) * rows + r) * pieces + number
        tl.store(part + row[:, None] * DV + dv, acc, mask=inside)
        tl.store(stats + 2 * row, m, mask=valid)
        tl.store(stats + 2 * row + 1, z, mask=valid)


@kernel(do_not_specialize=UNSPECIALIZED)
def decode_join(
    part, stats, out, sinks,
    out_batch, out_head, out_row, pieces, heads, queries,
    BP: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, SINKS: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)  # (batch, head, query), the order of the parts
    i = row % queries
    head = row // queries % heads
    batch = row // queries // heads
    factor: tl.constexpr = 1.0 if NATURAL else LOG2E
    n = tl.arange(0, BP)
    at = row.to(tl.int64) * pieces + n
    m = tl.load(stats + 2 * at, mask=n < pieces, other=float("-inf"))
    z = tl.load(stats + 2 * at + 1, mask=n < pieces, other=0.0)
    largest = tl.max(m, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * factor
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    shrink = power(m - base, NATURAL)
    total = tl.sum(z * shrink, 0)
    if SINKS:
        total += power(sink - base, NATURAL)
    dv = tl.arange(0, BDV)[None, :]
    some = (z > 0.0)[:, None] & (dv < DV)  # pieces that no query sees hold nothing to read
    parts = tl.load(part + at[:, None] * DV + dv, mask=some, other=0.0)
    y = tl.sum(parts * shrink[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = out + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
    place += i.to(tl.int64) * out_row + tl.arange(0, BDV)
    tl.store(place, y.to(out.dtype.element_ty), mask=tl.arange(0, BDV) < DV)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    length: int,
    scale: float,
    window: int,
    slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    table: Tensor | None,
    mask: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """The operator of this name."""
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, size = q.shape
    kv_heads, page, value_size = k.shape[1], k.shape[2], v.shape[-1]
    num_keys = page if table is None else page * table.shape[1]
    groups = heads // kv_heads
    out = q.new_empty((batch, queries, heads, value_size)).transpose(1, 2)
    kind, mask_strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
        mask = mask.float() if mask.dtype == torch.float64 else mask
        mask = mask.expand(batch, heads, queries, num_keys)
        mask_strides = mask.stride()  # type: ignore[assignment]
    natural = q.dtype == torch.float32 or kind == 2
    factor = 1.0 if natural else 1.4426950408889634
    piece = max(_PIECE, power_of_two(ceil_div(num_keys, _PIECES)))
    pieces = max(ceil_div(num_keys, piece), 1)
    rows = groups * queries
    blocks = min(max(16, power_of_two(rows)), _ROWS)
    block_d, block_dv = max(16, power_of_two(size)), max(16, power_of_two(value_size))
    part = stats = None
    if pieces > 1:
        part = q.new_empty((batch * heads * queries, pieces, value_size), dtype=torch.float32)
        stats = q.new_empty((batch * heads * queries, pieces, 2), dtype=torch.float32)
    block = max(block_d, block_dv) * (2 if q.dtype == torch.float32 else 1)
    config = _configs.select("decode_attention", block, q.get_device())
    no_scales = (0, 0, 0)
    decode_pieces(
        (pieces, kv_heads * ceil_div(rows, blocks), batch if rows else 0),
        (q, k, v, out, part, stats, lengths, table, mask, slopes, sinks, k_scale, v_scale),
        (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            0 if table is None else table.stride(0),
            *mask_strides,
            *(no_scales if k_scale is None else k_scale.stride()),
            *(no_scales if v_scale is None else v_scale.stride()),
            slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
            length,
            num_keys,
            min(window, num_keys + queries),
            piece,
            pieces,
            kv_heads,
            groups,
            queries,
            page,
            scale * factor,
            scale / softcap if softcap else 0.0,
            softcap * factor,
        ),
        config,
        BM=blocks,
        BN=config.tile[1],
        D=size,
        DV=value_size,
        BD=block_d,
        BDV=block_dv,
        PAGED=table is not None,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        ALIBI=slopes is not None,
        SINKS=sinks is not None,
        MASK=kind,
        SCALED=k_scale is not None,
        DIRECT=pieces == 1,
        NATURAL=natural,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )
    if pieces > 1:
        decode_join(
            (batch * heads * queries, 1, 1),
            (part, stats, out, sinks),
            (*out.stride()[:3], pieces, heads, queries),
            _configs.Config((1,), 4),
            BP=power_of_two(pieces),
            DV=value_size,
            BDV=block_dv,
            SINKS=sinks is not None,
            NATURAL=natural,
        )
    return out


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    q = torch.empty(32, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    lengths = q.new_empty(32, dtype=torch.int32)
    none = (None, None, 0.0, None, None, None, None)
    for size, dtype in ((128, q.dtype), (256, q.dtype), (64, torch.float32), (256, torch.float32)):
        x = q.new_empty(32, 32, 1, size, dtype=dtype)
        cache = x.new_empty(32, 8, 4096, size)
        call = partial(decode_attention, x, cache, cache, lengths, 0, 0.1, 0)
        name = "decode_attention" if size == 128 else f"decode_attention {size} {dtype}"
        yield name.replace("torch.", ""), partial(call, *none)
    pages = q.new_empty(4096, 8, 16, 128, dtype=torch.int8)
    scales, slopes = (q.new_empty(n, dtype=torch.float32) for n in ((4096, 8, 16), (32,)))
    table = lengths.new_empty(32, 256)
    more = (slopes, slopes, 30.0, table, None, scales, scales)
    call = partial(decode_attention, q, pages, pages, lengths, 0, 0.1, 1024)
    yield "decode_attention pages of int8 and all", partial(call, *more)
