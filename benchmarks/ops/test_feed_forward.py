"""feed_forward: cases."""

from __future__ import annotations

import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, rows: int, width: int, inner: int, *, gated=True, cold=False, backward=False):
    """Reads x and the weights, writes y; the backward has twice the products."""
    run = {True: (gated_ours, gated_eager, gated_oracle), False: (ours, eager, oracle)}[gated]

    def build() -> Work:
        x = randn(dtype, rows, width)
        into = [randn(dtype, inner, width, scale=width**-0.5) for _ in range(1 + gated)]
        out = randn(dtype, width, inner, scale=inner**-0.5)
        biases = () if gated else (randn(dtype, inner), randn(dtype, width))
        return Work((x, *into, out, *biases), *run)

    matrices = 3 if gated else 2
    return Case(
        op="feed_forward",
        shape=f"{'gated silu' if gated else 'gelu_tanh'} {rows} row{'s' if rows > 1 else ''} "
        f"{width}x{inner}{' cold' if cold else ''}",
        dtype=dtype,
        backward=backward,
        bytes=(3 if backward else 1)
        * size(dtype, (matrices, width, inner), (rows, width), (rows, width)),
        flops=(6 if backward else 2) * matrices * rows * width * inner,
        build=build,
        cold=cold,
    )


def gated_ours(x, w_gate, w_in, w_out):
    """The whole block in one call."""
    return ops.feed_forward(x, w_in, w_out, w_gate=w_gate, activation="silu")


def gated_oracle(x, w_gate, w_in, w_out):
    """The equation."""
    return reference.feed_forward(x, w_in, w_out, w_gate=w_gate, activation="silu")


def gated_eager(x, w_gate, w_in, w_out):
    """LlamaMLP of transformers."""
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_in), w_out)


def ours(x, w_in, w_out, b_in, b_out):
    """The whole block in one call."""
    return ops.feed_forward(x, w_in, w_out, b_in=b_in, b_out=b_out, activation="gelu_tanh")


def oracle(x, w_in, w_out, b_in, b_out):
    """The equation."""
    return reference.feed_forward(x, w_in, w_out, b_in=b_in, b_out=b_out, activation="gelu_tanh")


def eager(x, w_in, w_out, b_in, b_out):
    """GPT-2's block."""
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 576, 1536, cold=True),
        case(dtype, 8, 576, 1536),
        case(dtype, 256, 576, 1536),
        case(dtype, 256, 576, 1536, backward=True),
        case(dtype, 1, 768, 3072, gated=False, cold=True),
        case(dtype, 256, 768, 3072, gated=False, backward=True),
    )
]

test_feed_forward = benchmark_test(CASES)
