"""Root-mean-square normalisation, with the residual addition before it fused in."""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _torch
from fastlm.ops._library import Function, again, by_backend, define, direct, needs_grad, twice
from fastlm.ops._norm import (
    check,
    cuda_unsupported,
    empty_like,
    empty_vector,
    size_class,
    torch_unsupported,
    unsupported,
)
from fastlm.ops._registry import Backend, memory, plain, register, settle, triton

register(
    "rms_norm",
    Backend("cuda", ("cuda",), cuda_unsupported),
    Backend("cpu", ("cpu",), unsupported),
    triton(unsupported),
    plain(torch_unsupported),
    classes=size_class,
)

_forward = define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    lambda x, weight, eps, offset: empty_like(x),
)
_add_forward = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset)"
    " -> (Tensor, Tensor)",
    lambda x, residual, weight, eps, offset: (empty_like(x), empty_like(x)),
)
_backward = define(
    "rms_norm_backward(Tensor grad, Tensor? grad_summed, Tensor x, Tensor? weight, float eps,"
    " float offset) -> (Tensor, Tensor)",
    lambda grad, grad_summed, x, weight, eps, offset: (empty_like(x), empty_vector(x, weight)),
)

_FORWARD = by_backend("rms_norm", _forward)
_DIRECT = {name: direct(operator) for name, operator in _FORWARD.items()}
_ADD_FORWARD = by_backend("rms_norm", _add_forward)
_BACKWARD = by_backend("rms_norm", _backward)


class _RmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset, ctx.backend = eps, offset, backend
        return _FORWARD[backend](x, weight, eps, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if twice():
            return *_again(ctx, x, weight, ctx.needs_input_grad[:2], grad), None, None, None
        dx, dw = _BACKWARD[ctx.backend](grad, None, x, weight, ctx.eps, ctx.offset)
        return dx, None if weight is None else dw, None, None, None


class _AddRmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        offset: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        y, summed = _ADD_FORWARD[backend](x, residual, weight, eps, offset)
        ctx.save_for_backward(summed, weight)
        ctx.eps, ctx.offset, ctx.backend = eps, offset, backend
        return y, summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_summed: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        summed, weight = ctx.saved_tensors
        if twice():
            need = True, ctx.needs_input_grad[2]
            dx, dw = _again(ctx, summed, weight, need, grad)
            dx = dx + grad_summed
            return dx, dx, dw, None, None, None
        dx, dw = _BACKWARD[ctx.backend](grad, grad_summed, summed, weight, ctx.eps, ctx.offset)
        return dx, dx, None if weight is None else dw, None, None, None


def _again(
    ctx: Any, x: Tensor, weight: Tensor | None, need: tuple[bool, ...], grad: Tensor
) -> list[Any]:
    def function(x: Tensor, weight: Tensor | None) -> Any:
        return reference.rms_norm(x, weight, ctx.eps, weight_offset=ctx.offset)

    return again(function, (x, weight), need, grad)


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
    bits for any number of threads. Differentiable in x, weight and residual, a second time by
    PyTorch's own operators.
    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    try:
        key = (x.is_cpu or x.device, x.dtype, weight is None or weight.dtype)
        backend = _chosen.get(key) or _choose(key, x, weight, residual)
        if backend == "torch" or backend == "reference":
            if backend == "reference":
                check("rms_norm", x, residual, weight=weight)
            run = (_torch if backend == "torch" else reference).rms_norm
            return run(x, weight, eps, residual=residual, weight_offset=weight_offset)
        if residual is None:
            if is_grad_enabled() and needs_grad(x, weight):
                return _RmsNorm.apply(x, weight, eps, weight_offset, backend)
            forward = (_FORWARD if is_dynamo_compiling() else _DIRECT)[backend]
            return forward(x, weight, eps, weight_offset)
        if is_grad_enabled() and needs_grad(x, weight, residual):
            return _AddRmsNorm.apply(x, residual, weight, eps, weight_offset, backend)
        return _ADD_FORWARD[backend](x, residual, weight, eps, weight_offset)
    except (AttributeError, RuntimeError):
        check("rms_norm", x, residual, weight=weight)  # the kernel refused: say which argument
        raise


_chosen = memory()


def _choose(key: tuple[Any, ...], x: Tensor, weight: Tensor | None, residual: Tensor | None) -> str:
    sizes = x.shape, residual is not None, is_grad_enabled() and needs_grad(x, weight, residual)
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    dtype = None if weight is None else weight.dtype
    return settle("rms_norm", _chosen, key, x, sizes, weight=dtype)
