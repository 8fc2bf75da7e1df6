"""Root-mean-square normalisation, with the residual addition before it fused in."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import define, needs_grad
from fastlm.ops._registry import Backend, choose, native, register

_NATIVE = native(torch.float32, torch.bfloat16)


def _cpu_unsupported(dtype: torch.dtype, *, weight: torch.dtype | None) -> list[str]:
    reasons = _NATIVE(dtype)
    if not reasons and weight not in (None, dtype, torch.float32):
        reasons = [f"takes a weight of {dtype} or torch.float32, not {weight}"]
    return reasons


register(
    "rms_norm",
    Backend("cuda", ("cuda",), _cpu_unsupported),
    Backend("cpu", ("cpu",), _cpu_unsupported),
)

_forward = define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    lambda x, weight, eps, offset: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_add_forward = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset)"
    " -> (Tensor, Tensor)",
    lambda x, residual, weight, eps, offset: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
)


def _backward_fake(
    grad: Tensor, grad_summed: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, o: float
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if weight is None:
        return dx, x.new_empty((0, x.shape[-1]), dtype=torch.float32)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format)


_backward = define(
    "rms_norm_backward(Tensor grad, Tensor? grad_summed, Tensor x, Tensor? weight, float eps,"
    " float offset) -> (Tensor, Tensor)",
    _backward_fake,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return _forward(x, weight, eps, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx, dw = _backward(grad, None, x, weight, ctx.eps, ctx.offset)
        return dx, None if weight is None else dw, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        y, summed = _add_forward(x, residual, weight, eps, offset)
        ctx.save_for_backward(summed, weight)
        ctx.eps, ctx.offset = eps, offset
        return y, summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_summed: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        summed, weight = ctx.saved_tensors
        dx, dw = _backward(grad, grad_summed, summed, weight, ctx.eps, ctx.offset)
        return dx, dx, None if weight is None else dw, None, None


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
    weight_offset: float = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
    weight_offset: float = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2, -1) + eps) * (weight + weight_offset), with s = x + residual.

    Args:
        x: [..., H], any strides; fp32, bf16, fp16 or fp64.
        weight: [H], of x's dtype or fp32; None for ones (weight_offset is then not used).
        eps: added to the mean square.
        residual: like x; when given, s is returned beside y, rounded to x's dtype.
        weight_offset: 1.0 for weights stored as a difference from one.

    Returns:
        y like x, contiguous; with `residual` the pair (y, s).

    Raises:
        ValueError: a shape, dtype or device that does not fit x.
        TypeError: an argument that is no floating-point tensor.

    Statistics and products are fp32 with one rounding to x's dtype; the same input gives the same
    bits for any number of threads. Differentiable once in x, weight and residual.
    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    _check(x, weight, residual)
    backend = choose("rms_norm", x, weight=None if weight is None else weight.dtype)
    if backend == "reference":
        return reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    if residual is None:
        if needs_grad(x, weight):
            return _RmsNorm.apply(x, weight, eps, weight_offset)
        return _forward(x, weight, eps, weight_offset)
    if needs_grad(x, weight, residual):
        return _AddRmsNorm.apply(x, residual, weight, eps, weight_offset)
    return _add_forward(x, residual, weight, eps, weight_offset)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None) -> None:
    _checks.floating("rms_norm", "x", x)
    if x.dim() == 0:
        raise _checks.fail("rms_norm", "x", "of rank 1 or more", "a scalar")
    if weight is not None:
        _checks.floating("rms_norm", "weight", weight)
        _checks.shape("rms_norm", "weight", weight, x.shape[-1:])
        _checks.same_device("rms_norm", "weight", weight, x)
    if residual is not None:
        _checks.floating("rms_norm", "residual", residual)
        _checks.shape("rms_norm", "residual", residual, x.shape)
        _checks.same_dtype("rms_norm", "residual", residual, x)
        _checks.same_device("rms_norm", "residual", residual, x)
