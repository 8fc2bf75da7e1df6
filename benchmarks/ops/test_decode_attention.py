"""decode_attention: cases. One new token per sequence against a long contiguous cache."""

from __future__ import annotations

import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, batch: int, heads: int, kv_heads: int, keys: int, head: int):
    """Reads the keys and values once; the cache is a fourth longer than what is filled."""

    def build() -> Work:
        q = randn(dtype, batch, heads, 1, head)
        k, v = (randn(dtype, batch, kv_heads, keys + keys // 4, head) for _ in "kv")
        return Work(
            (q, k, v),
            lambda q, k, v: ops.decode_attention(q, k, v, keys),
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k[:, :, :keys], v[:, :, :keys], enable_gqa=heads != kv_heads
            ),
            lambda q, k, v: reference.decode_attention(q, k, v, keys),
        )

    return Case(
        op="decode_attention",
        shape=f"{batch}x{heads}/{kv_heads} heads, {keys} keys, {head}",
        dtype=dtype,
        backward=False,
        bytes=2 * size(dtype, (batch, kv_heads, keys, head)),
        flops=4 * batch * heads * keys * head,
        build=build,
    )


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 12, 12, 16, 64),
        case(dtype, 1, 9, 3, 256, 64),
        case(dtype, 4, 9, 3, 512, 64),
        case(dtype, 1, 12, 12, 2048, 64),
        case(dtype, 1, 32, 8, 2048, 128),
        case(dtype, 1, 32, 32, 2048, 128),
    )
]

test_decode_attention = benchmark_test(CASES)
