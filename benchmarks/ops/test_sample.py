"""sample: cases."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def eager(logits: Tensor, uniform: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """What generation loops do: topk or a sort, softmax, cumulative sum, search."""
    scores, ids = logits.float(), None
    if top_k is not None:
        scores, ids = scores.topk(top_k)
    elif top_p is not None:
        scores, ids = scores.sort(descending=True)
    p = scores.softmax(-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    if ids is not None:  # back to the order of the tokens
        p = torch.zeros_like(logits, dtype=p.dtype).scatter_(-1, ids, p)
    cumulative = p.double().cumsum(-1)
    wanted = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)


def case(dtype: str, rows: int, vocab: int, top_k: int | None, top_p: float | None):
    """Reads the logits once."""
    options = {"top_k": top_k, "top_p": top_p}

    def build() -> Work:
        logits = randn(dtype, rows, vocab, scale=4.0)
        uniform = 0.75 * torch.rand(rows, dtype=torch.float64)  # below 1 when jittered
        return Work(
            (logits, uniform),
            lambda logits, uniform: ops.sample(logits, uniform, **options),
            lambda logits, uniform: eager(logits, uniform, top_k, top_p),
            lambda logits, uniform: reference.sample(logits, uniform, **options),
        )

    cuts = "".join(f" {name}={value}" for name, value in options.items() if value is not None)
    return Case(
        op="sample",
        shape=f"{rows}x{vocab}{cuts}",
        dtype=dtype,
        backward=False,
        bytes=size(dtype, (rows, vocab)),
        flops=2 * rows * vocab,
        build=build,
    )


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 1, 32000, None, None),
        case(dtype, 1, 32000, 50, None),
        case(dtype, 1, 32000, None, 0.9),
        case(dtype, 1, 151936, None, 0.9),
        case(dtype, 8, 49152, 50, 0.9),
    )
]

test_sample = benchmark_test(CASES)
