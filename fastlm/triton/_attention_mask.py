"""The tiles that a mask leaves to see.

Computes   for each tile of queries the tiles of keys that some query sees, or the reverse
Algorithm  one program a list; it reads the mask tile by tile and appends what is not hidden
Tile       as attention's kernels cut queries and keys
Traffic    the mask once, broadcast dimensions not at all
Numerics   none
Source     block masks of FlexAttention, arXiv:2412.05496
"""

import triton
import triton.language as tl

from fastlm.triton._attention_tiles import UNSPECIALIZED, keys_of, mask_at, queries_of, visible
from fastlm.triton._launch import kernel


@kernel(do_not_specialize=UNSPECIALIZED)
def mask_tiles(
    mask, tiles, counts, batch_stride, head_stride, row_stride, col_stride, heads, tq, tk, window,
    num_rows, num_cols,
    BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Lists the tiles that a mask leaves to see: of keys for a tile of queries, or the reverse.

    KEYS: program r writes the keys' tiles that some query of tile r sees, ascending, to
    tiles[r, :counts[r]]; otherwise the queries' tiles that see some key of tile r.
    """
    pid = tl.program_id(0)
    slot = pid.to(tl.int64)
    row = pid % num_rows
    plane = pid // num_rows
    mask += (plane // heads).to(tl.int64) * batch_stride + (plane % heads).to(
        tl.int64
    ) * head_stride
    found = row * 0
    if KEYS:
        low, _, _, high = keys_of(row * BM, tq, tk, window, BM, BN, CAUSAL, WINDOW)
        p = row * BM + tl.arange(0, BM)[:, None] + tk - tq
        for first in range(low, high, BN):
            j = first + tl.arange(0, BN)[None, :]
            some = _some(mask, p, j, tq, tk, window, row_stride, col_stride, MASK, CAUSAL, WINDOW)
            tl.store(tiles + slot * num_cols + found, first // BN, mask=some)
            found += some.to(tl.int32)
    else:
        low, _, _, high = queries_of(row * BN, tq, tk, window, BM, BN, CAUSAL, WINDOW)
        j = row * BN + tl.arange(0, BN)[None, :]
        for first in range(low, high, BM):
            p = first + tl.arange(0, BM)[:, None] + tk - tq
            some = _some(mask, p, j, tq, tk, window, row_stride, col_stride, MASK, CAUSAL, WINDOW)
            tl.store(tiles + slot * num_cols + found, first // BM, mask=some)
            found += some.to(tl.int32)
    tl.store(counts + slot, found)


@triton.jit
def _some(
    mask, p, j, tq, tk, window, row_stride, col_stride, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    x = mask_at(mask, p, j, tq, tk, row_stride, col_stride)
    seen = x != float("-inf") if MASK == 2 else x != 0
    seen &= visible(p, j, tq, tk, window, CAUSAL, WINDOW)
    return tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
