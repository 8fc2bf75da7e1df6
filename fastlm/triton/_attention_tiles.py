"""What attention's kernels share: where tiles lie, which keys they see, what scores become.

Positions: query i of a sequence stands at i + tk - tq. A tile of BM queries and BN keys is
hidden (never visited), full (every query sees every key) or cut (scores are masked one by one).

Units: scores are kept in powers of two, s scale log2(e), where exp costs one instruction. NATURAL
kernels keep them as s scale: fp32, whose log-sum-exp must lose nothing, and masks that are added,
whose lowest numbers times log2(e) would overflow.
"""

import triton
import triton.language as tl

from fastlm.triton._primitives import tanh

# numbers that change from call to call: a kernel that assumed something of them would be compiled
# again and again
UNSPECIALIZED = (
    "tq", "tk", "window", "num_sequences", "num_tiles", "num_columns", "num_rows", "num_cols",
    "lse_batch", "lse_head", "lse_part", "glse_batch", "glse_head", "glse_row", "slopes_batch",
    "tiles_batch", "tiles_head", "mask_batch", "mask_head",
)  # fmt: skip
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find(starts, count, tile, B: tl.constexpr):
    """(sequence, tile in it) of a tile of packed sequences, each from tile starts[n] // B + n on.

    So many tiles suffice for any lengths, and none waits for another kernel to count them.
    """
    low = 0
    high = count - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(starts + middle) // B + middle <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    return low, tile - (tl.load(starts + low) // B + low)


@triton.jit
def sequence(starts, starts_q, starts_k, count, tile, B: tl.constexpr):
    """Where a tile of packed sequences, by `starts`, lies: (sequence, tile in it, where the rows of
    queries and of keys begin, how many of them)."""
    n, tile = find(starts, count, tile, B)
    q, k = tl.load(starts_q + n), tl.load(starts_k + n)
    tq, tk = tl.load(starts_q + n + 1) - q, tl.load(starts_k + n + 1) - k
    return n, tile, q.to(tl.int64), k.to(tl.int64), tq, tk


@triton.jit
def load(
    pointer, first, stride, count, R: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Rows first ... first + R of a matrix [count, C] as a tile [R, BC], zeros outside."""
    rows = tl.arange(0, R)[:, None]
    cols = tl.arange(0, BC)[None, :]
    at = pointer + tl.cast(first, tl.int64) * stride + rows * stride + cols
    if CHECKED and C != BC:
        return tl.load(at, mask=(rows < count - first) & (cols < C), other=0.0)
    if CHECKED:
        return tl.load(at, mask=rows < count - first, other=0.0)
    if C != BC:
        return tl.load(at, mask=cols < C, other=0.0)
    return tl.load(at)


@triton.jit
def store(
    pointer, first, stride, count, x, R: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, R)[:, None]
    cols = tl.arange(0, BC)[None, :]
    at = pointer + tl.cast(first, tl.int64) * stride + rows * stride + cols
    tl.store(at, x.to(pointer.dtype.element_ty), mask=(rows < count - first) & (cols < C))


@triton.jit
def keys_of(
    first, tq, tk, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): the keys that queries first ... first + BM see.

    Tiles of keys from low to full_low and from full_high to high are cut, those between full; all
    but high are multiples of BN.
    """
    here = first + tk - tq  # position of the first query,
    last = tl.minimum(first + BM, tq) - 1 + tk - tq  # and of the last
    low = first * 0
    high = first * 0 + tk
    full_low = low
    full_high = high
    if CAUSAL:
        high = tl.minimum(high, last + 1)
        full_high = tl.minimum(full_high, here + 1)
    elif WINDOW:
        high = tl.minimum(high, last + window)
        full_high = tl.minimum(full_high, here + window)
    if WINDOW:
        low = tl.maximum(here - window + 1, 0) // BN * BN
        full_low = (tl.maximum(last - window + 1, 0) + BN - 1) // BN * BN
    full_high = tl.maximum(full_high, 0) // BN * BN
    return low, full_low, tl.maximum(full_low, full_high), high


@triton.jit
def queries_of(
    first, tq, tk, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): the queries that see keys first ... first + BN."""
    here = first - (tk - tq)  # the query that stands at the first key,
    last = tl.minimum(first + BN, tk) - 1 - (tk - tq)  # and at the last
    low = first * 0
    high = first * 0 + tq
    full_low = low
    full_high = high
    if CAUSAL:
        low = tl.maximum(here, 0) // BM * BM
        full_low = (tl.maximum(last, 0) + BM - 1) // BM * BM
    elif WINDOW:
        low = tl.maximum(here - window + 1, 0) // BM * BM
        full_low = (tl.maximum(last - window + 1, 0) + BM - 1) // BM * BM
    if WINDOW:
        high = tl.minimum(high, last + window)
        full_high = tl.minimum(full_high, here + window)
    full_high = tl.maximum(full_high, 0) // BM * BM
    return low, full_low, tl.maximum(full_low, full_high), high


@triton.jit
def visible(p, j, tq, tk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at position p sees key j; p and j broadcast."""
    seen = (j < tk) & (p < tk)
    if CAUSAL:
        seen &= j <= p
    if WINDOW:
        seen &= p - j < window
        if not CAUSAL:
            seen &= j - p < window
    return seen


@triton.jit
def mask_at(mask, p, j, tq, tk, row_stride, col_stride):
    """The mask's elements of the queries at positions p and keys j; 0 outside."""
    i = (p - (tk - tq)).to(tl.int64)
    at = mask + i * row_stride + j.to(tl.int64) * col_stride
    return tl.load(at, mask=(i >= 0) & (i < tq) & (j < tk), other=0)


@triton.jit
def score(
    s, p, j, tq, tk, window, slope, unit, cap_in, cap_out, mask, mask_row, mask_col,
    CUT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """(scores in units, tanh of the soft-cap or s) of products s at positions p and keys j.

    FOLD leaves out the factor `unit`, for the caller to fold into the exponent.
    """
    t = s
    if SOFTCAP:
        t = tanh(s * cap_in)
        s = t * cap_out
    elif not FOLD:
        s = s * unit
    if ALIBI:
        s -= slope * tl.abs((p - j).to(tl.float32))
    if MASK == 2:
        s += mask_at(mask, p, j, tq, tk, mask_row, mask_col).to(tl.float32)
    if MASK == 1:
        seen = mask_at(mask, p, j, tq, tk, mask_row, mask_col) != 0
        s = tl.where(seen & visible(p, j, tq, tk, window, CAUSAL, WINDOW), s, float("-inf"))
    elif CUT:
        s = tl.where(visible(p, j, tq, tk, window, CAUSAL, WINDOW), s, float("-inf"))
    return s, t


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """exp of a score in units, of an error that does not grow with x (Cody and Waite)."""
    if NATURAL:
        x = tl.where(x < -200.0, -200.0, x)  # gives zero, as -inf does; NaN stays
        n = tl.floor(x * LOG2E + 0.5)
        x = (x - n * 0.693359375) + n * 2.12194440e-4  # n ln(2), its first part without rounding
        return tl.math.exp2(x * LOG2E) * tl.math.exp2(n)
    return tl.math.exp2(x)
