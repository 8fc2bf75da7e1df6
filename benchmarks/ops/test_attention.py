"""attention: cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(
    dtype: str,
    batch: int,
    heads: int,
    tokens: int,
    head: int,
    *,
    kv_heads: int | None = None,
    form: str = "causal",
    backward: bool = False,
):
    """Reads q, k, v and writes the output; two products of T x T x D per head, five backward."""
    kv = kv_heads or heads

    def build() -> Work:
        q = randn(dtype, batch, tokens, heads, head).transpose(1, 2)
        k, v = (randn(dtype, batch, tokens, kv, head).transpose(1, 2) for _ in "kv")
        grouped = {"enable_gqa": True} if kv != heads else {}
        if form == "padded":
            mask = left_padding(batch, tokens)
            return Work(
                (q, k, v),
                lambda q, k, v: ops.attention(q, k, v, mask=mask),
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, **grouped),
                lambda q, k, v: reference.attention(q, k, v, mask=mask),
            )
        causal = form == "causal"
        return Work(
            (q, k, v),
            lambda q, k, v: ops.attention(q, k, v, causal=causal),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped),
            lambda q, k, v: reference.attention(q, k, v, causal=causal),
        )

    pairs = tokens * tokens / (1 if form == "full" else 2)
    products = 7 if backward else 2
    query, key = (batch, heads, tokens, head), (batch, kv, tokens, head)
    group = "" if kv == heads else f"/{kv}"
    return Case(
        op="attention",
        shape=f"{form} ({batch},{heads}{group},{tokens},{head})",
        dtype=dtype,
        backward=backward,
        bytes=(3 if backward else 1) * size(dtype, query, query, key, key),
        flops=int(products * 2 * batch * heads * pairs * head),
        build=build,
    )


def left_padding(batch: int, tokens: int):
    """[B, 1, T, T], causal, the first B/8 T tokens of sequence b hidden; a row sees itself."""
    at = torch.arange(tokens)
    start = torch.arange(batch)[:, None] * tokens // 8
    seen = (at >= start)[:, None, None, :] & (at[:, None] >= at)
    return seen | torch.eye(tokens, dtype=torch.bool)


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 12, 16, 64),
        case(dtype, 1, 9, 256, 64, kv_heads=3),
        case(dtype, 1, 12, 1024, 64),
        case(dtype, 1, 12, 1024, 64, backward=True),
        case(dtype, 4, 12, 256, 64, backward=True),
        case(dtype, 4, 12, 256, 64, form="padded"),
        case(dtype, 4, 12, 256, 64, form="full"),
        case(dtype, 1, 8, 2048, 128, kv_heads=2),
    )
]

test_attention = benchmark_test(CASES)
