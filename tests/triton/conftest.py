"""Triton's kernels on the CPU, in Triton's interpreter.

It has to be on before Triton is imported, and nothing else works in such a process: so these files
are collected only under TRITON_INTERPRET=1, where tests/test_triton.py runs them.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def _round_as_gpus_do() -> None:
    """The interpreter cuts fp32 off to bf16; the hardware rounds to the nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    others = interpreter._convert_float

    def convert(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(nan, 0x7FC0, nearest).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << 16
        return others(values, source, target, rounding)

    interpreter._convert_float = convert


if INTERPRETED:
    _round_as_gpus_do()


@pytest.fixture(autouse=True)
def _forced():
    from fastlm import ops

    with ops.use_backend("triton"):
        yield
