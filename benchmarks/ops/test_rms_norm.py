"""rms_norm: cases."""

from __future__ import annotations

import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, rows: int, width: int, *, backward: bool = False, residual: bool = False):
    """Reads x and writes y; the backward reads x and dy and writes dx; a residual adds one each."""

    def build() -> Work:
        x, weight = randn(dtype, rows, width), 1 + randn(dtype, width, scale=0.1)
        if residual:
            return Work(
                (x, weight, randn(dtype, rows, width)),
                lambda x, w, r: ops.rms_norm(x, w, residual=r),
                eager_add,
                lambda x, w, r: reference.rms_norm(x, w, residual=r),
            )
        return Work((x, weight), ops.rms_norm, eager, reference.rms_norm)

    passes = (4 if residual else 2) + (3 if backward else 0)
    return Case(
        op="rms_norm",
        shape=f"{rows}x{width}" + ("+residual" if residual else ""),
        dtype=dtype,
        backward=backward,
        bytes=passes * size(dtype, (rows, width)),
        flops=(12 if backward else 4) * rows * width,
        build=build,
    )


def eager(x, weight):
    """PyTorch's composite."""
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def eager_add(x, weight, residual):
    """What a decoder layer does: add, then norm."""
    summed = x + residual
    return F.rms_norm(summed, weight.shape, weight, 1e-6), summed


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 768),
        case(dtype, 1, 576, residual=True),
        case(dtype, 2048, 768),
        case(dtype, 2048, 768, backward=True),
        case(dtype, 16, 4096, residual=True),
        case(dtype, 2048, 2048, residual=True),
        case(dtype, 4096, 2048, backward=True),
    )
]

test_rms_norm = benchmark_test(CASES)
