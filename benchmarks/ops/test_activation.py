"""activation and gated_activation: cases."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test

EAGER = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def case(dtype: str, kind: str, rows: int, width: int, *, gated: bool = False, backward=False):
    """Reads the inputs and writes y; the backward reads them and dy and writes the gradients."""
    act = EAGER[kind]

    def build() -> Work:
        x = randn(dtype, rows, width)
        if gated:
            return Work(
                (x, randn(dtype, rows, width)),
                lambda gate, up: ops.gated_activation(gate, up, kind),
                lambda gate, up: act(gate) * up,
                lambda gate, up: reference.gated_activation(gate, up, kind),
            )
        return Work(
            (x,),
            lambda x: ops.activation(x, kind),
            act,
            lambda x: reference.activation(x, kind),
        )

    passes = (3 if gated else 2) + (0 if not backward else 5 if gated else 3)
    return Case(
        op="activation",
        shape=f"{'gated ' if gated else ''}{kind} {rows}x{width}",
        dtype=dtype,
        backward=backward,
        bytes=passes * size(dtype, (rows, width)),
        flops=(60 if backward else 20) * rows * width,
        build=build,
    )


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, "silu", 1, 1536, gated=True),
        case(dtype, "silu", 512, 2048, gated=True),
        case(dtype, "silu", 2048, 5632, gated=True),
        case(dtype, "silu", 512, 5632, gated=True, backward=True),
        case(dtype, "gelu_tanh", 1, 3072),
        case(dtype, "gelu_tanh", 1024, 3072),
        case(dtype, "gelu", 1024, 3072, backward=True),
    )
]

test_activation = benchmark_test(CASES)
