"""Writes a new operator's row: a small working one to change, tests and benchmark included.

    python tools/new_op.py soft_sign          # reference only
    python tools/new_op.py soft_sign --cpu    # with a C++ kernel for every instruction set

What it writes computes y = factor * x. It refuses to overwrite a file.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

REFERENCE = '''\
"""@op@ in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

from torch import Tensor


def @op@(x: Tensor, factor: float) -> Tensor:
    """y = factor * x."""
    return (x if x.dtype.itemsize > 4 else x.float()).mul(factor).to(x.dtype)
'''

DOC = '''\
    """y = factor * x.

    Args:
        x: any shape and strides; fp32, bf16, fp16 or fp64.
        factor: a number.

    Returns:
        y like x, contiguous.

    Raises:
        TypeError: x is no floating-point tensor.

    Computed in fp32 with one rounding to x's dtype. Differentiable once in x.

    >>> @op@(torch.tensor([1.0, 2.0]), 3.0)
    tensor([3., 6.])
    """
    _checks.floating("@op@", "x", x)
'''

API = (
    '''\
"""One sentence about what @op@ is for."""

from __future__ import annotations

from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register

register("@op@")


def @op@(x: Tensor, factor: float) -> Tensor:
'''
    + DOC
    + """\
    choose("@op@", x)
    return reference.@op@(x, factor)
"""
)

API_CPU = (
    '''\
"""One sentence about what @op@ is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import define, needs_grad
from fastlm.ops._registry import Backend, choose, native, register

register("@op@", Backend("cpu", ("cpu",), native(torch.float32, torch.bfloat16)))

_forward = define(
    "@op@(Tensor x, float factor) -> Tensor",
    lambda x, factor: torch.empty_like(x, memory_format=torch.contiguous_format),
)


class _@Op@(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return _forward(x, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _forward(grad, ctx.factor), None


def @op@(x: Tensor, factor: float) -> Tensor:
'''
    + DOC
    + """\
    if choose("@op@", x) == "reference":
        return reference.@op@(x, factor)
    return _@Op@.apply(x, factor) if needs_grad(x) else _forward(x, factor)
"""
)

CONTRACT = """\
// Contract of @op@: what a kernel is given, on any device.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// y = factor * x.
struct @Op@Args {
  const void* x;  // [count]
  void* y;        // like x
  float factor;
  DType dtype;
};

struct @Op@Kernels {
  void (*forward)(const @Op@Args&, int64_t begin, int64_t end);
};

}  // namespace fastlm
"""

KERNEL = """\
// @op@ forward.
// Computes   y = factor * x
// Algorithm  one pass
// Tile       [ v0 | v1 | ... | masked tail ]
// Traffic    reads x once, writes y
// Numerics   fp32, one rounding to the output
// Source     -

template <class T>
void forward_range(const @Op@Args& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const VecF factor = set1(a.factor);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(y + i, load(x + i) * factor);
  if (i < end) {
    const int n = static_cast<int>(end - i);
    store(y + i, load(x + i, n) * factor, n);
  }
}

void forward(const @Op@Args& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kFloat32) return forward_range<float>(a, begin, end);
  forward_range<bf16>(a, begin, end);
}

FASTLM_EXPORT(@Op@Kernels, @op@) = {forward};
"""

BINDING = """\
// Binding of @op@: allocates, splits elements over threads, registers the CPU kernel.
#include "ops/@op@.h"

#include "torch/alloc.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(@Op@Kernels, @op@)

namespace fastlm {
namespace {

Tensor @op@(const Tensor& x_, double factor) {
  const Tensor x = dense(x_);
  Tensor y = empty_cpu_like(x);
  @Op@Args args;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.factor = static_cast<float>(factor);
  args.dtype = dtype_of(x);
  const auto kernel = @op@_kernels().forward;
  parallel_rows(x.numel(), 8, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("@op@", TORCH_BOX(&@op@)); }

}  // namespace fastlm
"""

TEST = '''\
"""@op@: every implementation against float64, forward and gradient."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from fastlm.testing import check

SHAPES = [(1,), (3, 63), (2, 5, 64), (100, 768)]


@pytest.mark.parametrize("backend", ops.implementations("@op@"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, dtype, shape):
    with ops.use_backend(backend):
        check(
            lambda x: ops.@op@(x, 1.7),
            lambda x: x * 1.7,
            lambda x: reference.@op@(x, 1.7),
            [torch.randn(shape, dtype=dtype)],
        )


def test_strided_and_empty_inputs():
    x = torch.randn(6, 40, 8).transpose(1, 2)
    assert torch.equal(ops.@op@(x, 2.0), ops.@op@(x.contiguous(), 2.0))
    assert ops.@op@(torch.empty(0, 8), 2.0).shape == (0, 8)


def test_fullgraph_compile_forward_and_backward():
    x = torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(ops.@op@, fullgraph=True)(x, 3.0)
    (grad,) = torch.autograd.grad(compiled.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 3.0))


def test_bad_input_names_the_argument():
    with pytest.raises(TypeError, match="@op@: x must be a floating-point tensor"):
        ops.@op@(torch.ones(2).int(), 2.0)
'''

BENCHMARK = '''\
"""@op@: cases."""

from __future__ import annotations

from fastlm import ops, reference

from ..case import DTYPES, Case, Work, randn, size
from ..pytest_cases import benchmark_test


def case(dtype: str, rows: int, width: int) -> Case:
    """Reads x and writes y."""

    def build() -> Work:
        return Work(
            (randn(dtype, rows, width),),
            lambda x: ops.@op@(x, 1.7),
            lambda x: x * 1.7,
            lambda x: reference.@op@(x, 1.7),
        )

    return Case(
        op="@op@",
        shape=f"{rows}x{width}",
        dtype=dtype,
        backward=False,
        bytes=2 * size(dtype, (rows, width)),
        flops=rows * width,
        build=build,
    )


CASES = [case(dtype, rows, 768) for dtype in DTYPES for rows in (1, 2048)]

test_@op@ = benchmark_test(CASES)
'''


def row(op: str, cpu: bool) -> dict[str, str]:
    """The files of a row by path."""
    camel = "".join(part.capitalize() for part in op.split("_"))
    files = {
        f"fastlm/reference/{op}.py": REFERENCE,
        f"fastlm/ops/{op}.py": API_CPU if cpu else API,
        f"tests/ops/test_{op}.py": TEST,
        f"benchmarks/ops/test_{op}.py": BENCHMARK,
    }
    if cpu:
        files[f"csrc/ops/{op}.h"] = CONTRACT
        files[f"csrc/cpu/{op}.h"] = KERNEL
        files[f"csrc/torch/{op}.cpp"] = BINDING
    return {f: text.replace("@op@", op).replace("@Op@", camel) for f, text in files.items()}


def with_export(text: str, package: str, op: str) -> str:
    """The text of an __init__.py with the operator imported and listed, both in order."""
    line = f"from {package}.{op} import {op}\n"
    imports = [*re.findall(r"^from \S+ import .*\n", text, re.M), line]
    plain = sorted(i for i in imports if not i.split()[1].rpartition(".")[2].startswith("_"))
    after = plain[plain.index(line) - 1] if plain.index(line) else imports[0]
    text = text.replace(after, after + line, 1)
    names = re.search(r"__all__ = \[(.*?)\]", text, re.S)
    if names is None:
        raise SystemExit(f"new_op: no __all__ in {package}")
    listed = sorted([*re.findall(r'"(\w+)"', names[1]), op])
    inside = "".join(f'    "{name}",\n' for name in listed)
    return text.replace(names[0], f"__all__ = [\n{inside}]", 1)


def create(root: Path, op: str, cpu: bool) -> list[str]:
    """Writes the row under root, adds the operator to both packages; returns the paths."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", op):
        raise SystemExit(f"new_op: expected a name like soft_sign, got {op!r}")
    files = row(op, cpu)
    present = [file for file in files if (root / file).exists()]
    if present:
        raise SystemExit(f"new_op: {present[0]} exists")
    for file, text in files.items():
        (root / file).write_text(text)
    for package in ("ops", "reference"):
        file = root / f"fastlm/{package}/__init__.py"
        file.write_text(with_export(file.read_text(), f"fastlm.{package}", op))
    return list(files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--cpu", action="store_true", help="with a C++ kernel")
    arguments = parser.parse_args()
    for file in create(ROOT, arguments.name, arguments.cpu):
        print(file)
    print("Next: add it to OPS in benchmarks/case.py, then make test", file=sys.stderr)


if __name__ == "__main__":
    main()
