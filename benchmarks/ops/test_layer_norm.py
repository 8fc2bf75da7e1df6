"""layer_norm: cases."""

from __future__ import annotations

import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, rows: int, width: int, *, backward: bool = False, residual: bool = False):
    """Reads x and writes y; the backward reads x and dy and writes dx; a residual adds one each."""

    def build() -> Work:
        x, weight = randn(dtype, rows, width), 1 + randn(dtype, width, scale=0.1)
        bias = randn(dtype, width)
        if residual:
            return Work(
                (x, weight, bias, randn(dtype, rows, width)),
                lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r),
                eager_add,
                lambda x, w, b, r: reference.layer_norm(x, w, b, residual=r),
            )
        return Work((x, weight, bias), ops.layer_norm, eager, reference.layer_norm)

    passes = (4 if residual else 2) + (3 if backward else 0)
    return Case(
        op="layer_norm",
        shape=f"{rows}x{width}" + ("+residual" if residual else ""),
        dtype=dtype,
        backward=backward,
        bytes=passes * size(dtype, (rows, width)),
        flops=(16 if backward else 6) * rows * width,
        build=build,
    )


def eager(x, weight, bias):
    """PyTorch's fused kernel."""
    return F.layer_norm(x, weight.shape, weight, bias)


def eager_add(x, weight, bias, residual):
    """What a decoder layer does: add, then norm."""
    summed = x + residual
    return F.layer_norm(summed, weight.shape, weight, bias), summed


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 768),
        case(dtype, 2048, 768),
        case(dtype, 2048, 768, backward=True),
        case(dtype, 16, 4096, residual=True),
        case(dtype, 2048, 2048, residual=True),
        case(dtype, 4096, 2048, backward=True),
    )
]

test_layer_norm = benchmark_test(CASES)
