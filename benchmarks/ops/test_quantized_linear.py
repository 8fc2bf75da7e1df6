"""quantized_linear: cases.

Eager multiplies the same weight, dequantized beforehand. Further peers: our kernel with activations
of 8 bits, and PyTorch's own products with integer weights, which take bf16 and other scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, bits: int, rows: int, k: int, n: int):
    """Reads the integers and one fp16 scale per 32 of them, and x; writes y."""

    def build() -> Work:
        qweight = ops.quantize_weight(randn("fp32", n, k, scale=k**-0.5), bits)
        w = qweight.dequantize(DTYPES[dtype])
        peers = {"int8": lambda x: ops.quantized_linear(x, qweight, activations="int8")}
        if dtype == "bf16" and bits == 8:
            values, scale = qweight.unpack().values, torch.rand(n).bfloat16()
            peers["int8pack"] = lambda x: torch._weight_int8pack_mm(x, values, scale)
        return Work(
            (randn(dtype, rows, k),),
            lambda x: ops.quantized_linear(x, qweight),
            lambda x: F.linear(x, w),
            lambda x: reference.quantized_linear(x, qweight),
            peers,
        )

    return Case(
        op="quantized_linear",
        shape=f"int{bits} {rows} row{'s' if rows > 1 else ''} {k}x{n} cold",
        dtype=dtype,
        backward=False,
        bytes=n * k * bits // 8 + n * k // 16 + size(dtype, (rows, k), (rows, n)),
        flops=2 * rows * k * n,
        build=build,
        cold=True,
    )


CASES = [
    make
    for dtype in DTYPES
    for make in (
        case(dtype, 8, 1, 768, 2048),
        case(dtype, 4, 1, 768, 2048),
        case(dtype, 8, 8, 768, 2048),
    )
]

test_quantized_linear = benchmark_test(CASES)
