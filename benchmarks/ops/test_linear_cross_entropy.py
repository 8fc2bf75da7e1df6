"""linear_cross_entropy: cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, rows: int, width: int, vocab: int, *, backward: bool = True):
    """Reads x and the head's weight, in the backward twice, and writes their gradients."""

    def build() -> Work:
        x, w = randn(dtype, rows, width), randn(dtype, vocab, width, scale=width**-0.5)
        target = torch.randint(vocab, (rows,))
        return Work((x, w, target), ops.linear_cross_entropy, eager, reference.linear_cross_entropy)

    return Case(
        op="linear_cross_entropy",
        shape=f"{rows}x{width}x{vocab}",
        dtype=dtype,
        backward=backward,
        bytes=(3 if backward else 1) * size(dtype, (rows, width), (vocab, width)),
        flops=(6 if backward else 2) * rows * width * vocab,
        build=build,
    )


def eager(x, weight, target):
    """All logits, then the loss."""
    return F.cross_entropy(F.linear(x, weight), target)


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 16, 288, 1000),
        case(dtype, 256, 576, 16384),
        case(dtype, 256, 576, 16384, backward=False),
        case(dtype, 512, 576, 49152),
        case(dtype, 2048, 288, 32000),
    )
]

test_linear_cross_entropy = benchmark_test(CASES)
