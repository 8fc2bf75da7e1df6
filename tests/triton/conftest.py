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


def _multiply_halves() -> None:
    """The interpreter multiplies the bits of bf16 as integers; tensor cores widen to fp32."""
    import triton.language as tl
    from triton.runtime import interpreter

    others = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return others(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _patch_once() -> None:
    """The interpreter replaces the language's functions anew in every call within a kernel."""
    import types

    import triton.language as tl
    from triton.runtime import interpreter

    patch, modules = (
        interpreter._patch_lang,
        types.SimpleNamespace(__globals__={"a": tl, "b": tl.core}),
    )
    running = False

    def patch_lang(function):
        nonlocal running
        scope = interpreter._LangPatchScope()
        if not running:
            running, scope = True, patch(modules)
            restore = scope.restore

            def stop():
                nonlocal running
                running = False
                restore()

            scope.restore = stop
        return scope

    interpreter._patch_lang = patch_lang


if INTERPRETED:
    _round_as_gpus_do()
    _multiply_halves()
    _patch_once()


@pytest.fixture(autouse=True)
def _forced():
    from fastlm import ops

    with ops.use_backend("triton"):
        yield
