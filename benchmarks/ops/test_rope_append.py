"""rope_append: cases, q, k and v being views of one projection, the cache of a model's size.

A further peer: our own rotation and the copies, one by one.
"""

from __future__ import annotations

from functools import partial

import torch

from fastlm import ops

from ..case import Case, Work, randn, size
from ..pytest_cases import benchmark_test
from .test_rope import eager, tables


def case(dtype: str, batch: int, tokens: int, heads: int, kv_heads: int, head: int, keys: int):
    """Reads q, k and v once and writes them once."""

    def build() -> Work:
        every = randn(dtype, batch, tokens, heads + 2 * kv_heads, head).transpose(1, 2)
        cos, sin = tables(dtype, keys, head)
        caches = tuple(randn(dtype, batch, kv_heads, keys, head) for _ in "kv")
        form = partial(run, heads=heads, kv_heads=kv_heads, length=keys)
        exact = [x.double() for x in (cos, sin, *caches)]
        return Work(
            (every,),
            lambda x: form(x, ops.rope_append, cos, sin, *caches),
            lambda x: form(x, separate, cos, sin, *caches),
            lambda x: form(x, separate, *exact),
            {"apart": lambda x: form(x, apart, cos, sin, *caches)},
        )

    grouped = "" if heads == kv_heads else f"/{kv_heads}"
    values = batch * tokens * (heads + 2 * kv_heads) * head
    return Case(
        op="rope_append",
        shape=f"({batch},{tokens},{heads}{grouped},{head})",
        dtype=dtype,
        backward=False,
        bytes=2 * size(dtype, (values,)),
        flops=3 * batch * tokens * (heads + kv_heads) * head,
        build=build,
    )


@torch.no_grad()
def run(x, append, cos, sin, k_cache, v_cache, *, heads: int, kv_heads: int, length: int):
    """What a step makes: the turned queries; the cache is checked by the operator's tests."""
    q, k, v = x.split_with_sizes((heads, kv_heads, kv_heads), 1)
    return append(q, k, v, cos, sin, k_cache, v_cache, length)


def separate(q, k, v, cos, sin, k_cache, v_cache, length):
    """Rotation and copies as transformers' Llama and its static cache make them."""
    new = slice(length - q.shape[2], length)
    q, k = eager(q, k, cos[new], sin[new])
    k_cache[:, :, new] = k
    v_cache[:, :, new] = v
    return q


def apart(q, k, v, cos, sin, k_cache, v_cache, length):
    """Our own rotation, then the copies."""
    new = slice(length - q.shape[2], length)
    q, k_cache[:, :, new] = ops.rope(q, k, cos[new], sin[new])
    v_cache[:, :, new] = v
    return q


CASES = [
    make
    for dtype in ("fp32", "bf16")
    for make in (
        case(dtype, 1, 1, 9, 3, 64, 256),
        case(dtype, 1, 1, 32, 32, 128, 2048),
        case(dtype, 8, 1, 32, 8, 128, 2048),
        case(dtype, 1, 512, 12, 12, 64, 1024),
    )
]

test_rope_append = benchmark_test(CASES)
