"""attention backward.

Computes   p_ij = exp(s_ij - lse_i), dv_j = sum_i p_ij g_i, ds_ij = p_ij (g_i . v_j - delta_i),
           dq_i = scale sum_j ds_ij k_j, dk_j = scale sum_i ds_ij q_i,
           dsink = sum_i exp(sink - lse_i) (glse_i - sum_j p_ij g_i . v_j),
           dslope = -sum_ij ds_ij |position_i - j|, dmask_ij = ds_ij
           with delta_i = g_i . out_i - glse_i = sum_j p_ij g_i . v_j - glse_i
Algorithm  delta; in fp32, or with gradients of slopes or a mask, as the sum: where one p is nearly
           1 the errors of g_i . v_j cancel in ds, and what was rounded off out does not. Then dk
           and dv by tiles of keys, each summing over the queries of all heads that share it; then
           dq by tiles of queries. Each sum has one owner and one order: same bits every time.
           ATOMIC adds dq from the first kernel instead: five products, not seven
Tile       [ full | cut ] as in the forward pass, by queries and by keys
Traffic    q, k, v, g once a tile of the other side, mostly from L2; scores never leave the chip
Numerics   fp32 scores and accumulators; p and ds rounded to the element type before a product
Source     Dao, arXiv:2307.08691, algorithm 2
"""

import triton
import triton.language as tl

from fastlm.triton._attention_tiles import (
    LOG2E,
    UNSPECIALIZED,
    keys_of,
    load,
    power,
    queries_of,
    score,
    sequence,
    store,
)
from fastlm.triton._launch import kernel


@kernel(do_not_specialize=UNSPECIALIZED)
def attention_delta(
    out, grad, grad_lse, delta,
    out_batch, out_head, out_row, grad_batch, grad_head, grad_row,
    glse_batch, glse_head, glse_row, lse_batch, lse_head,
    heads, num_tiles, tq,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Packed sequences are one sequence here."""
    pid = tl.program_id(0)
    row = pid % num_tiles * BM
    head = (pid // num_tiles % heads).to(tl.int64)
    batch = (pid // num_tiles // heads).to(tl.int64)
    i = row + tl.arange(0, BM)
    x = load(out + batch * out_batch + head * out_head, row, out_row, tq, BM, DV, BDV, True)
    g = load(grad + batch * grad_batch + head * grad_head, row, grad_row, tq, BM, DV, BDV, True)
    total = tl.sum(x.to(tl.float32) * g.to(tl.float32), 1)
    if GRAD_LSE:
        at = grad_lse + batch * glse_batch + head * glse_head + i.to(tl.int64) * glse_row
        total -= tl.load(at, mask=i < tq, other=0.0).to(tl.float32)
    tl.store(delta + batch * lse_batch + head * lse_head + i, total, mask=i < tq)


@triton.jit
def _weights(s, high, low, unit, NATURAL: tl.constexpr, FOLD: tl.constexpr, LOW: tl.constexpr):
    """exp(s - lse) of scores s; lse in two parts where it must lose nothing."""
    s = s * unit - high if FOLD else s - high
    if LOW:
        s -= low
    return power(s, NATURAL)


@triton.jit
def _lse(lse, lse_part, i, count, NATURAL: tl.constexpr, LOW: tl.constexpr):
    """(lse in units, what it lost); +inf, which hides the row, where it saw nothing."""
    high = tl.load(lse + i, mask=i < count, other=float("-inf"))
    low = tl.zeros_like(high)
    if LOW:
        low = tl.load(lse + lse_part + i, mask=i < count, other=0.0)
    if not NATURAL:
        high *= LOG2E
    return tl.where(high == float("-inf"), float("inf"), high), low


@triton.jit
def _visit_queries(
    dk, dv, keys, values, q, grad, lse, delta, dq, first, j, tq, tk, window, slope, unit, scale,
    cap_in, cap_out, mask, q_row, grad_row, dq_row, lse_part, mask_row, mask_col,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CUT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr, NATURAL: tl.constexpr, FOLD: tl.constexpr,
    LOW: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: (dk, dv) go on. Scores lie transposed, [keys, queries]."""
    i = first + tl.arange(0, BM)
    queries = load(q, first, q_row, tq, BM, D, BD, CUT)
    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    p = i[None, :] + tk - tq
    s, t = score(
        s, p, j[:, None], tq, tk, window, slope, unit, cap_in, cap_out, mask, mask_row, mask_col,
        CUT, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, FOLD,
    )  # fmt: skip
    high, low = _lse(lse, lse_part, i, tq, NATURAL, LOW)
    weights = _weights(s, high[None, :], low[None, :], unit, NATURAL, FOLD, LOW)
    g = load(grad, first, grad_row, tq, BM, DV, BDV, CUT)
    dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
    ds = tl.dot(values, tl.trans(g), input_precision=PRECISION)
    ds = weights * (ds - tl.load(delta + i, mask=i < tq, other=0.0)[None, :])
    if SOFTCAP:
        ds *= 1.0 - t * t
    ds = ds.to(queries.dtype)
    dk = tl.dot(ds, queries, dk, input_precision=PRECISION)
    if ATOMIC:
        d = tl.arange(0, BD)[None, :]
        at = dq + tl.cast(first, tl.int64) * dq_row + tl.arange(0, BM)[:, None] * dq_row + d
        part = tl.dot(tl.trans(ds), keys, input_precision=PRECISION) * scale
        tl.atomic_add(at, part, mask=(i[:, None] < tq) & (d < D), sem="relaxed")
    return dk, dv


@kernel(do_not_specialize=UNSPECIALIZED)
def attention_bwd_kv(
    q, k, v, grad, lse, delta, dq, dk, dv, mask, tiles, counts, slopes, starts_q, starts_k,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, dq_batch, dq_head, dq_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, lse_batch, lse_head, lse_part,
    mask_batch, mask_head, mask_row, mask_col, tiles_batch, tiles_head, slopes_batch,
    heads, groups, num_sequences, num_tiles, num_columns, tq, tk, window,
    unit, scale, cap_in, cap_out,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr,
    NATURAL: tl.constexpr, FOLD: tl.constexpr, LOW: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % num_tiles  # causal: the first keys are seen by most queries
    kv_heads = heads // groups
    head_k = pid // num_tiles % kv_heads
    batch = pid // num_tiles // kv_heads
    if PACKED:
        batch, tile, begin_q, begin_k, tq, tk = sequence(
            starts_k, starts_q, starts_k, num_sequences, tile, BN
        )
        if tile * BN >= tk:
            return
        q += begin_q * q_row
        grad += begin_q * grad_row
        if ATOMIC:
            dq += begin_q * dq_row
        lse += begin_q
        delta += begin_q
        k += begin_k * k_row
        v += begin_k * v_row
        dk += begin_k * dk_row
        dv += begin_k * dv_row
        wide = batch.to(tl.int64) * 0
    else:
        wide = batch.to(tl.int64)
    column = tile * BN
    head_wide = head_k.to(tl.int64)
    j = column + tl.arange(0, BN)
    keys = load(k + wide * k_batch + head_wide * k_head, column, k_row, tk, BN, D, BD, True)
    values = load(v + wide * v_batch + head_wide * v_head, column, v_row, tk, BN, DV, BDV, True)
    sum_k = tl.zeros([BN, BD], tl.float32)
    sum_v = tl.zeros([BN, BDV], tl.float32)
    low, full_low, full_high, high = queries_of(column, tq, tk, window, BM, BN, CAUSAL, WINDOW)
    factor: tl.constexpr = 1.0 if NATURAL else LOG2E
    slope = 0.0
    for member in range(0, groups):
        head = head_k * groups + member
        head_wide = head.to(tl.int64)
        q_at = q + wide * q_batch + head_wide * q_head
        grad_at = grad + wide * grad_batch + head_wide * grad_head
        dq_at = dq + wide * dq_batch + head_wide * dq_head if ATOMIC else dq
        lse_at = lse + wide * lse_batch + head_wide * lse_head
        delta_at = delta + wide * lse_batch + head_wide * lse_head
        if ALIBI:
            slope = tl.load(slopes + batch * slopes_batch + head) * factor
        if MASK > 0:
            mask_from = mask + wide * mask_batch + head_wide * mask_head
            slot = (wide * tiles_batch + head_wide * tiles_head) * num_tiles + tile
            for n in range(0, tl.load(counts + slot)):
                first = tl.load(tiles + slot * num_columns + n) * BM
                sum_k, sum_v = _visit_queries(
                    sum_k, sum_v, keys, values, q_at, grad_at, lse_at, delta_at, dq_at, first, j,
                    tq, tk, window, slope, unit, scale, cap_in, cap_out, mask_from, q_row,
                    grad_row, dq_row, lse_part, mask_row, mask_col, BM, D, DV, BD, BDV, True,
                    CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, LOW, ATOMIC, PRECISION,
                )  # fmt: skip
        else:
            if CAUSAL or WINDOW:
                for first in range(low, tl.minimum(full_low, high), BM):
                    sum_k, sum_v = _visit_queries(
                        sum_k, sum_v, keys, values, q_at, grad_at, lse_at, delta_at, dq_at, first,
                        j, tq, tk, window, slope, unit, scale, cap_in, cap_out, mask, q_row,
                        grad_row, dq_row, lse_part, mask_row, mask_col, BM, D, DV, BD, BDV, True,
                        CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, LOW, ATOMIC,
                        PRECISION,
                    )  # fmt: skip
            for first in range(full_low, full_high, BM):
                sum_k, sum_v = _visit_queries(
                    sum_k, sum_v, keys, values, q_at, grad_at, lse_at, delta_at, dq_at, first, j,
                    tq, tk, window, slope, unit, scale, cap_in, cap_out, mask, q_row, grad_row,
                    dq_row, lse_part, mask_row, mask_col, BM, D, DV, BD, BDV, False, CAUSAL,
                    WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, LOW, ATOMIC, PRECISION,
                )  # fmt: skip
            for first in range(full_high, high, BM):
                sum_k, sum_v = _visit_queries(
                    sum_k, sum_v, keys, values, q_at, grad_at, lse_at, delta_at, dq_at, first, j,
                    tq, tk, window, slope, unit, scale, cap_in, cap_out, mask, q_row, grad_row,
                    dq_row, lse_part, mask_row, mask_col, BM, D, DV, BD, BDV, True, CAUSAL,
                    WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, LOW, ATOMIC, PRECISION,
                )  # fmt: skip
    head_wide = head_k.to(tl.int64)
    dk += wide * dk_batch + head_wide * dk_head
    dv += wide * dv_batch + head_wide * dv_head
    store(dk, column, dk_row, tk, sum_k * scale, BN, D, BD)
    store(dv, column, dv_row, tk, sum_v, BN, DV, BDV)


@triton.jit
def _visit_keys(
    dq, dots, bends, queries, g, high, low, delta, k, v, dmask, first, p, tq, tk, window, slope,
    unit, cap_in, cap_out, mask, k_row, v_row, mask_row, mask_col,
    BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CUT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr, NATURAL: tl.constexpr, FOLD: tl.constexpr,
    LOW: tl.constexpr, DOTS: tl.constexpr, DELTA: tl.constexpr, DSLOPES: tl.constexpr,
    DMASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: (dq, row sums of p_ij g_i . v_j, of ds_ij |position_i - j|) go on."""
    keys = load(k, first, k_row, tk, BN, D, BD, CUT)
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    j = first + tl.arange(0, BN)[None, :]
    s, t = score(
        s, p[:, None], j, tq, tk, window, slope, unit, cap_in, cap_out, mask, mask_row, mask_col,
        CUT, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, FOLD,
    )  # fmt: skip
    weights = _weights(s, high[:, None], low[:, None], unit, NATURAL, FOLD, LOW)
    values = load(v, first, v_row, tk, BN, DV, BDV, CUT)
    ds = tl.dot(g, tl.trans(values), input_precision=PRECISION)
    if DOTS:
        dots += tl.sum(weights * ds, 1)
    if not DELTA:
        ds = weights * (ds - delta[:, None])
        if DSLOPES:
            bends += tl.sum(ds * tl.abs((p[:, None] - j).to(tl.float32)), 1)
        if DMASK:
            i = (p - (tk - tq)).to(tl.int64)[:, None]
            tl.store(dmask + i * tk + j, ds, mask=(i < tq) & (j < tk))
        if SOFTCAP:
            ds *= 1.0 - t * t
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq, dots, bends


@kernel(do_not_specialize=UNSPECIALIZED)
def attention_bwd_q(
    q, k, v, grad, grad_lse, lse, delta, dq, dsinks, dslopes, dmask, mask, tiles, counts, slopes,
    sinks, starts_q, starts_k,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, glse_batch, glse_head, glse_row, dq_batch, dq_head, dq_row,
    lse_batch, lse_head, lse_part,
    mask_batch, mask_head, mask_row, mask_col, tiles_batch, tiles_head, slopes_batch,
    heads, groups, num_sequences, num_tiles, num_columns, tq, tk, window,
    unit, scale, cap_in, cap_out,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    MASK: tl.constexpr, NATURAL: tl.constexpr, FOLD: tl.constexpr, LOW: tl.constexpr,
    GRAD_LSE: tl.constexpr, DELTA: tl.constexpr, DSLOPES: tl.constexpr, DMASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DELTA: makes delta as the sum, and nothing else; LOW: delta was made so."""
    DOTS: tl.constexpr = DELTA or (SINKS and not LOW)
    pid = tl.program_id(0)
    tile = num_tiles - 1 - pid % num_tiles
    head = pid // num_tiles % heads
    batch = pid // num_tiles // heads
    if PACKED:
        batch, tile, begin_q, begin_k, tq, tk = sequence(
            starts_q, starts_q, starts_k, num_sequences, tile, BM
        )
        if tile * BM >= tq:
            return
        q += begin_q * q_row
        grad += begin_q * grad_row
        if not DELTA:
            dq += begin_q * dq_row
        if GRAD_LSE:
            grad_lse += begin_q * glse_row
        lse += begin_q
        delta += begin_q
        if SINKS:
            dsinks += begin_q
        if DSLOPES:
            dslopes += begin_q
        k += begin_k * k_row
        v += begin_k * v_row
        wide = batch.to(tl.int64) * 0
    else:
        wide = batch.to(tl.int64)
    head_wide = head.to(tl.int64)
    head_k = (head // groups).to(tl.int64)
    k += wide * k_batch + head_k * k_head
    v += wide * v_batch + head_k * v_head
    rows = wide * lse_batch + head_wide * lse_head
    if MASK > 0:
        mask += wide * mask_batch + head_wide * mask_head
    if DMASK:
        dmask += (wide * heads + head_wide) * tq * tk
    factor: tl.constexpr = 1.0 if NATURAL else LOG2E
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slopes_batch + head) * factor

    row = tile * BM
    i = row + tl.arange(0, BM)
    p = i + tk - tq
    queries = load(q + wide * q_batch + head_wide * q_head, row, q_row, tq, BM, D, BD, True)
    grad += wide * grad_batch + head_wide * grad_head
    g = load(grad, row, grad_row, tq, BM, DV, BDV, True)
    upper, lost = _lse(lse + rows, lse_part, i, tq, NATURAL, LOW)
    total = tl.zeros([BM, BD], tl.float32)
    dots = tl.zeros([BM], tl.float32)
    bends = tl.zeros([BM], tl.float32)
    deltas = dots if DELTA else tl.load(delta + rows + i, mask=i < tq, other=0.0)
    low, full_low, full_high, high = keys_of(row, tq, tk, window, BM, BN, CAUSAL, WINDOW)
    if MASK > 0:
        slot = (wide * tiles_batch + head_wide * tiles_head) * num_tiles + tile
        for n in range(0, tl.load(counts + slot)):
            first = tl.load(tiles + slot * num_columns + n) * BN
            total, dots, bends = _visit_keys(
                total, dots, bends, queries, g, upper, lost, deltas, k, v, dmask, first, p, tq, tk,
                window, slope, unit, cap_in, cap_out, mask, k_row, v_row, mask_row, mask_col, BN, D,
                DV, BD, BDV, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, LOW, DOTS,
                DELTA, DSLOPES, DMASK, PRECISION,
            )  # fmt: skip
    else:
        if WINDOW:
            for first in range(low, tl.minimum(full_low, high), BN):
                total, dots, bends = _visit_keys(
                    total, dots, bends, queries, g, upper, lost, deltas, k, v, dmask, first, p, tq,
                    tk, window, slope, unit, cap_in, cap_out, mask, k_row, v_row, mask_row,
                    mask_col, BN, D, DV, BD, BDV, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK,
                    NATURAL, FOLD, LOW, DOTS, DELTA, DSLOPES, DMASK, PRECISION,
                )  # fmt: skip
        for first in range(full_low, full_high, BN):
            total, dots, bends = _visit_keys(
                total, dots, bends, queries, g, upper, lost, deltas, k, v, dmask, first, p, tq, tk,
                window, slope, unit, cap_in, cap_out, mask, k_row, v_row, mask_row, mask_col, BN, D,
                DV, BD, BDV, False, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, LOW, DOTS,
                DELTA, DSLOPES, DMASK, PRECISION,
            )  # fmt: skip
        for first in range(full_high, high, BN):
            total, dots, bends = _visit_keys(
                total, dots, bends, queries, g, upper, lost, deltas, k, v, dmask, first, p, tq, tk,
                window, slope, unit, cap_in, cap_out, mask, k_row, v_row, mask_row, mask_col, BN, D,
                DV, BD, BDV, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASK, NATURAL, FOLD, LOW, DOTS,
                DELTA, DSLOPES, DMASK, PRECISION,
            )  # fmt: skip
    if GRAD_LSE and DOTS:
        at = grad_lse + wide * glse_batch + head_wide * glse_head + i.to(tl.int64) * glse_row
        dots -= tl.load(at, mask=i < tq, other=0.0).to(tl.float32)
    if DELTA:
        tl.store(delta + rows + i, dots, mask=i < tq)
    else:
        store(dq + wide * dq_batch + head_wide * dq_head, row, dq_row, tq, total * scale, BM, D, BD)
        if DSLOPES:
            tl.store(dslopes + rows + i, -bends, mask=i < tq)
        if SINKS:
            sink = tl.load(sinks + head) * factor
            away = sink - upper
            # and by this rounding
            lost += (upper + (away - sink)) - (sink - (away - (away - sink)))
            weights = power(away, NATURAL)
            if LOW:
                weights -= weights * tl.where(weights == 0.0, 0.0, lost)  # infinities
            dots = dots if DOTS else deltas
            tl.store(dsinks + rows + i, -dots * weights, mask=i < tq)


@kernel(do_not_specialize=("total",))
def sequence_sums(x, y, starts, total, heads, BLOCK: tl.constexpr):
    """Sums [N, heads] of x [heads, total] over the rows of each of N packed sequences."""
    pid = tl.program_id(0)
    n, head = pid // heads, pid % heads
    first, last = tl.load(starts + n), tl.load(starts + n + 1)
    x += head.to(tl.int64) * total
    sums = tl.zeros([BLOCK], tl.float32)
    for at in range(first, last, BLOCK):
        i = at + tl.arange(0, BLOCK)
        sums += tl.load(x + i, mask=i < last, other=0.0)
    tl.store(y + pid, tl.sum(sums, 0))
