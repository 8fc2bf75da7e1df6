"""linear: cases. Cold ones read their weights from memory, as a decoding step does."""

from __future__ import annotations

import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, rows: int, k: int, n: int, *, cold: bool = False, backward: bool = False):
    """Reads x and w, writes y; the backward has two more products and writes dx and dw."""

    def build() -> Work:
        x, w = randn(dtype, rows, k), randn(dtype, n, k, scale=k**-0.5)
        return Work((x, w), ops.linear, F.linear, reference.linear)

    return Case(
        op="linear",
        shape=f"{rows} row{'s' if rows > 1 else ''} {k}x{n}{' cold' if cold else ''}",
        dtype=dtype,
        backward=backward,
        bytes=(3 if backward else 1) * size(dtype, (rows, k), (n, k), (rows, n)),
        flops=(6 if backward else 2) * rows * k * n,
        build=build,
        cold=cold,
    )


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 576, 576),
        case(dtype, 1, 768, 2048, cold=True),
        case(dtype, 1, 576, 49152, cold=True),
        case(dtype, 4, 768, 2048, cold=True),
        case(dtype, 16, 768, 2048),
        case(dtype, 64, 768, 2048),
        case(dtype, 512, 768, 2048),
        case(dtype, 512, 768, 768, backward=True),
    )
]

test_linear = benchmark_test(CASES)
