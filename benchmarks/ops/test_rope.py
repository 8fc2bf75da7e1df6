"""rope: cases. q and k lie as projections leave them: [B, T, H, D] seen as [B, H, T, D]."""

from __future__ import annotations

import torch

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(
    dtype: str, batch: int, tokens: int, heads: int, kv_heads: int, head: int, *, backward=False
):
    """Reads and writes q and k once; the backward does the same to their gradients."""

    def build() -> Work:
        q = randn(dtype, batch, tokens, heads, head).transpose(1, 2)
        k = randn(dtype, batch, tokens, kv_heads, head).transpose(1, 2)
        cos, sin = tables(dtype, tokens, head)
        return Work(
            (q, k),
            lambda q, k: ops.rope(q, k, cos, sin),
            lambda q, k: eager(q, k, cos, sin),
            lambda q, k: reference.rope(q, k, cos.double(), sin.double()),
        )

    values = batch * tokens * (heads + kv_heads) * head
    grouped = "" if heads == kv_heads else f"/{kv_heads}"
    return Case(
        op="rope",
        shape=f"({batch},{tokens},{heads}{grouped},{head})",
        dtype=dtype,
        backward=backward,
        bytes=(4 if backward else 2) * size(dtype, (values,)),
        flops=(6 if backward else 3) * values,
        build=build,
    )


def tables(dtype: str, tokens: int, head: int):
    """cos and sin [T, D] as transformers' Llama makes them."""
    frequency = 10000.0 ** (-torch.arange(0, head, 2) / head)
    angle = torch.arange(tokens)[:, None] * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(DTYPES[dtype]), angle.sin().to(DTYPES[dtype])


def eager(q, k, cos, sin):
    """apply_rotary_pos_emb of transformers."""
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rotate_half(x):
    """(x1, x2) -> (-x2, x1)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((-x2, x1), -1)


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 1, 9, 3, 64),
        case(dtype, 1, 16, 12, 12, 64),
        case(dtype, 1, 512, 9, 3, 64),
        case(dtype, 1, 2048, 32, 32, 128),
        case(dtype, 1, 2048, 32, 32, 128, backward=True),
        case(dtype, 8, 256, 12, 12, 64, backward=True),
    )
]

test_rope = benchmark_test(CASES)
