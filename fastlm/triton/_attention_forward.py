"""attention forward.

Computes   out_i = sum_j softmax_j(s_ij) v_j, lse_i = log sum_j exp(s_ij)
Algorithm  one program a tile of BM queries of one head; it walks the tiles of BN keys that the
           tile sees with the running maximum and sum of each row (online softmax). PACK: the
           rows of a tile are the queries of all heads of a group, one query's beside each other
Tile       [ cut by the window | full: no masking | cut by causal, window or the last key ]
Traffic    q and out once; k and v once a tile of queries, mostly from L2
Numerics   fp32 scores, sums and accumulator; weights rounded to v's type before they meet v
Source     Dao, arXiv:2307.08691, algorithm 1; sinks: Xiao et al., arXiv:2309.17453
"""

import triton
import triton.language as tl

from fastlm.triton._attention_tiles import (
    LN2,
    LOG2E,
    UNSPECIALIZED,
    keys_of,
    load,
    power,
    score,
    sequence,
    store,
)
from fastlm.triton._launch import kernel


@triton.jit
def _visit(
    m, z, acc, q, k, v, first, p, tq, tk, window, slope, unit, cap_in, cap_out, mask, k_row, v_row,
    mask_row, mask_col,
    BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CUT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr, NATURAL: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: (maximum, sum, accumulator) go on."""
    keys = load(k, first, k_row, tk, BN, D, BD, CUT)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    j = first + tl.arange(0, BN)[None, :]
    s, _ = score(
        s, p[:, None], j, tq, tk, window, slope, unit, cap_in, cap_out, mask, mask_row, mask_col,
        CUT, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, FOLD,
    )  # fmt: skip
    largest = tl.maximum(m, tl.max(s, 1) * unit) if FOLD else tl.maximum(m, tl.max(s, 1))
    at = largest
    if CUT or MASK > 0:  # a row may have seen nothing yet
        at = tl.where(largest == float("-inf"), 0.0, largest)
    weights = power(s * unit - at[:, None], NATURAL) if FOLD else power(s - at[:, None], NATURAL)
    shrink = power(m - at, NATURAL)
    z = z * shrink + tl.sum(weights, 1)
    values = load(v, first, v_row, tk, BN, DV, BDV, CUT)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return largest, z, acc


@triton.jit
def _rows_at(i, member, row_stride, head_stride, BC: tl.constexpr):
    """Offsets of the elements of packed rows [queries x heads, BC]."""
    at = i.to(tl.int64) * row_stride + member.to(tl.int64) * head_stride
    return at[:, None] + tl.arange(0, BC)[None, :]


@kernel(do_not_specialize=UNSPECIALIZED)
def attention_fwd(
    q, k, v, out, lse, mask, tiles, counts, slopes, sinks, starts_q, starts_k,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, lse_batch, lse_head, lse_part,
    mask_batch, mask_head, mask_row, mask_col, tiles_batch, tiles_head, slopes_batch,
    heads, groups, num_sequences, num_tiles, num_columns, tq, tk, window,
    unit, cap_in, cap_out,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    MASK: tl.constexpr, NATURAL: tl.constexpr, FOLD: tl.constexpr, LSE: tl.constexpr,
    PACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(PACK == 1 or (MASK == 0 and not PACKED))
    SPAN: tl.constexpr = BM // PACK  # queries of a tile
    pid = tl.program_id(0)
    tile = num_tiles - 1 - pid % num_tiles  # the longest rows of a causal head first
    head = pid // num_tiles % (heads // PACK) * PACK
    batch = pid // num_tiles // (heads // PACK)
    if PACKED:
        batch, tile, begin_q, begin_k, tq, tk = sequence(
            starts_q, starts_q, starts_k, num_sequences, tile, BM
        )
        if tile * BM >= tq:
            return
        q += begin_q * q_row
        out += begin_q * out_row
        if LSE:
            lse += begin_q
        k += begin_k * k_row
        v += begin_k * v_row
        wide = batch.to(tl.int64) * 0
    else:
        wide = batch.to(tl.int64)
    head_k = (head // groups).to(tl.int64)
    q += wide * q_batch + head.to(tl.int64) * q_head
    k += wide * k_batch + head_k * k_head
    v += wide * v_batch + head_k * v_head
    out += wide * out_batch + head.to(tl.int64) * out_head
    if LSE:
        lse += wide * lse_batch + head.to(tl.int64) * lse_head
    if MASK > 0:
        mask += wide * mask_batch + head.to(tl.int64) * mask_head
    factor: tl.constexpr = 1.0 if NATURAL else LOG2E
    row = tile * SPAN
    if PACK > 1:
        r = tl.arange(0, BM)
        member = r % PACK
        i = tl.where(r < SPAN * PACK, row + r // PACK, tq)
        head += member
    else:
        i = row + tl.arange(0, BM)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slopes_batch + head) * factor
        if PACK > 1:
            slope = slope[:, None]
    p = i + tk - tq
    m = tl.full([BM], float("-inf"), tl.float32)
    z = tl.zeros([BM], tl.float32)
    if SINKS:
        m = tl.zeros([BM], tl.float32) + tl.load(sinks + head) * factor
        z += 1.0
    acc = tl.zeros([BM, BDV], tl.float32)
    if PACK > 1:
        inside = (i < tq)[:, None] & (tl.arange(0, BD) < D)[None, :]
        queries = tl.load(q + _rows_at(i, member, q_row, q_head, BD), mask=inside, other=0.0)
    else:
        queries = load(q, row, q_row, tq, BM, D, BD, True)

    low, full_low, full_high, high = keys_of(row, tq, tk, window, SPAN, BN, CAUSAL, WINDOW)
    if MASK > 0:
        slot = (wide * tiles_batch + head.to(tl.int64) * tiles_head) * num_tiles + tile
        for n in range(0, tl.load(counts + slot)):
            first = tl.load(tiles + slot * num_columns + n) * BN
            m, z, acc = _visit(
                m, z, acc, queries, k, v, first, p, tq, tk, window, slope, unit, cap_in, cap_out,
                mask, k_row, v_row, mask_row, mask_col, BN, D, DV, BD, BDV, True, CAUSAL, WINDOW,
                SOFTCAP, ALIBI, MASK, NATURAL, FOLD, PRECISION,
            )  # fmt: skip
    else:
        if WINDOW:
            for first in range(low, tl.minimum(full_low, high), BN):
                m, z, acc = _visit(
                    m, z, acc, queries, k, v, first, p, tq, tk, window, slope, unit, cap_in,
                    cap_out, mask, k_row, v_row, mask_row, mask_col, BN, D, DV, BD, BDV, True,
                    CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, PRECISION,
                )  # fmt: skip
        for first in range(full_low, full_high, BN):
            m, z, acc = _visit(
                m, z, acc, queries, k, v, first, p, tq, tk, window, slope, unit, cap_in, cap_out,
                mask, k_row, v_row, mask_row, mask_col, BN, D, DV, BD, BDV, False, CAUSAL, WINDOW,
                SOFTCAP, ALIBI, MASK, NATURAL, FOLD, PRECISION,
            )  # fmt: skip
        for first in range(full_high, high, BN):
            m, z, acc = _visit(
                m, z, acc, queries, k, v, first, p, tq, tk, window, slope, unit, cap_in, cap_out,
                mask, k_row, v_row, mask_row, mask_col, BN, D, DV, BD, BDV, True, CAUSAL, WINDOW,
                SOFTCAP, ALIBI, MASK, NATURAL, FOLD, PRECISION,
            )  # fmt: skip

    empty = (m == float("-inf")) | (z == 0.0)
    sums = tl.where(empty, 1.0, z)
    if PACK > 1:
        inside = (i < tq)[:, None] & (tl.arange(0, BDV) < DV)[None, :]
        y = (acc / sums[:, None]).to(out.dtype.element_ty)
        tl.store(out + _rows_at(i, member, out_row, out_head, BDV), y, mask=inside)
    else:
        store(out, row, out_row, tq, acc / sums[:, None], BM, DV, BDV)
    if LSE:
        if PACK > 1:
            lse += member.to(tl.int64) * lse_head
        m = tl.where(empty, 0.0, m)
        if NATURAL:  # and what rounding takes off the sum: the larger first, then the smaller
            least = tl.log(sums)
            whole = m + least
            lost = tl.where(tl.abs(m) > tl.abs(least), least - (whole - m), m - (whole - least))
        else:
            whole = (m + tl.math.log2(sums)) * LN2
            lost = tl.zeros([BM], tl.float32)
        tl.store(lse + i, tl.where(empty, float("-inf"), whole), mask=i < tq)
        tl.store(lse + lse_part + i, tl.where(empty, 0.0, lost), mask=i < tq)
