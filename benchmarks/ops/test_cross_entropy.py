"""cross_entropy: cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, rows: int, vocab: int, *, backward: bool = False):
    """Reads the logits once; with the backward, writes their gradient in the same pass."""

    def build() -> Work:
        logits, target = randn(dtype, rows, vocab, scale=3.0), torch.randint(vocab, (rows,))
        return Work((logits, target), ops.cross_entropy, F.cross_entropy, reference.cross_entropy)

    return Case(
        op="cross_entropy",
        shape=f"{rows}x{vocab}",
        dtype=dtype,
        backward=backward,
        bytes=(2 if backward else 1) * size(dtype, (rows, vocab)),
        flops=(30 if backward else 20) * rows * vocab,
        build=build,
    )


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 32000),
        case(dtype, 16, 1000, backward=True),
        case(dtype, 512, 32000),
        case(dtype, 512, 32000, backward=True),
        case(dtype, 256, 49152, backward=True),
    )
]

test_cross_entropy = benchmark_test(CASES)
