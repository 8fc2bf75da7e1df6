"""What rms_norm and layer_norm share: argument checks and what the native kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import _checks
from fastlm.ops._measured import direction, rows
from fastlm.ops._registry import Unsupported, native

_TYPES = native(torch.float32, torch.bfloat16, torch.float16)
_CUDA = native(torch.float32, torch.bfloat16)


def unsupported(
    dtype: torch.dtype,
    *,
    weight: torch.dtype | None,
    bias: torch.dtype | None = None,
    types: Unsupported = _TYPES,
) -> list[str]:
    """Why a CPU or Triton kernel cannot take these element types."""
    reasons = types(dtype)
    for name, other in (("weight", weight), ("bias", bias)):
        if not reasons and other not in (None, dtype, torch.float32):
            reasons.append(f"takes a {name} of {dtype} or torch.float32, not {other}")
    if not reasons and bias not in (None, weight):
        reasons.append(f"takes a bias beside a weight of its type, not {bias} beside {weight}")
    return reasons


def cuda_unsupported(dtype: torch.dtype, **facts: torch.dtype | None) -> list[str]:
    """Why a CUDA kernel cannot: they have no fp16."""
    return unsupported(dtype, **facts, types=_CUDA)


def torch_unsupported(dtype: torch.dtype, **facts: torch.dtype | None) -> list[str]:
    """Why PyTorch's kernels cannot."""
    others = {name: other for name, other in facts.items() if other not in (None, dtype)}
    return [f"takes a {name} of {dtype}, not {other}" for name, other in others.items()]


def size_class(shape: torch.Size, residual: bool, grad: bool) -> str:
    """The class of a call's sizes: "9-16 x 4096 + residual, with gradients"."""
    return rows(shape) + (" + residual" if residual else "") + direction(grad)


def check(op: str, x: Tensor, residual: Tensor | None, **vectors: Tensor | None) -> None:
    """Raises the error that names the argument at fault, if there is one."""
    _checks.floating(op, "x", x)
    if x.dim() == 0:
        raise _checks.fail(op, "x", "of rank 1 or more", "a scalar")
    for name, vector in vectors.items():
        if vector is not None:
            _checks.floating(op, name, vector)
            _checks.shape(op, name, vector, x.shape[-1:])
            _checks.same_device(op, name, vector, x)
    if residual is not None:
        _checks.floating(op, "residual", residual)
        _checks.shape(op, "residual", residual, x.shape)
        _checks.same_dtype(op, "residual", residual, x)
        _checks.same_device(op, "residual", residual, x)


def empty_like(x: Tensor) -> Tensor:
    """The shape of a result: like x, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_vector(x: Tensor, vector: Tensor | None) -> Tensor:
    """The shape of a vector's gradient; no rows where there is no vector."""
    if vector is None:
        return x.new_empty((0, x.shape[-1]), dtype=torch.float32)
    return empty_like(vector)
