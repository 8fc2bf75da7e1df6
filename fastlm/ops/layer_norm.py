"""Layer normalisation, with the residual addition before it fused in."""

from __future__ import annotations

from typing import Any, overload

import torch
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
    "layer_norm",
    Backend("cuda", ("cuda",), cuda_unsupported),
    Backend("cpu", ("cpu",), unsupported),
    triton(unsupported),
    plain(torch_unsupported),
    classes=size_class,
)

_forward = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda x, weight, bias, eps: empty_like(x),
)
_add_forward = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    lambda x, residual, weight, bias, eps: (empty_like(x), empty_like(x)),
)
_backward = define(
    "layer_norm_backward(Tensor grad, Tensor? grad_summed, Tensor x, Tensor? weight, bool bias,"
    " float eps) -> (Tensor, Tensor, Tensor)",
    lambda grad, grad_summed, x, weight, bias, eps: (
        empty_like(x),
        empty_vector(x, weight),
        empty_vector(x, weight if bias else None),
    ),
)

_FORWARD = by_backend("layer_norm", _forward)
_DIRECT = {name: direct(operator) for name, operator in _FORWARD.items()}
_ADD_FORWARD = by_backend("layer_norm", _add_forward)
_BACKWARD = by_backend("layer_norm", _backward)


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.bias, ctx.backend = eps, bias is not None, backend
        return _FORWARD[backend](x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if twice():
            return *_again(ctx, x, weight, ctx.needs_input_grad[:3], grad), None, None
        dx, dw, db = _BACKWARD[ctx.backend](grad, None, x, weight, ctx.bias, ctx.eps)
        return dx, None if weight is None else dw, db if ctx.bias else None, None, None


class _AddLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        y, summed = _ADD_FORWARD[backend](x, residual, weight, bias, eps)
        ctx.save_for_backward(summed, weight)
        ctx.eps, ctx.bias, ctx.backend = eps, bias is not None, backend
        return y, summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_summed: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        summed, weight = ctx.saved_tensors
        if twice():
            need = True, *ctx.needs_input_grad[2:4]
            dx, dw, db = _again(ctx, summed, weight, need, grad)
            dx = dx + grad_summed
            return dx, dx, dw, db, None, None
        dx, dw, db = _BACKWARD[ctx.backend](grad, grad_summed, summed, weight, ctx.bias, ctx.eps)
        return dx, dx, None if weight is None else dw, db if ctx.bias else None, None, None


def _again(
    ctx: Any, x: Tensor, weight: Tensor | None, need: tuple[bool, ...], grad: Tensor
) -> list[Any]:
    # the gradients do not depend on it; the kernels take it beside a weight of its type only
    bias = torch.zeros_like(weight, requires_grad=True) if ctx.bias else None  # type: ignore[arg-type]

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
        return reference.layer_norm(x, weight, bias, ctx.eps)

    return again(function, (x, weight, bias), need, grad)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with s = x + residual.

    Args:
        x: [..., H], any strides; fp32, bf16, fp16 or fp64.
        weight: [H], of x's dtype or fp32; None for ones.
        bias: [H], of x's dtype or fp32; None for zeros.
        eps: added to the variance.
        residual: like x; when given, s is returned beside y, rounded to x's dtype.

    Returns:
        y like x, contiguous; with `residual` the pair (y, s).

    Raises:
        ValueError: a shape, dtype or device that does not fit x.
        TypeError: an argument that is no floating-point tensor.

    Mean and variance (of the population, over the last dimension) are taken in two passes in fp32,
    so a mean far larger than the spread costs no accuracy; one rounding to x's dtype. The same
    input gives the same bits for any number of threads. Differentiable, a second time by PyTorch's
    own operators.
    Source: Ba, Kiros and Hinton, arXiv:1607.06450.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), eps=0.0)
    tensor([[-1.,  1.]])
    """
    try:
        key = (
            x.is_cpu or x.device,
            x.dtype,
            weight is None or weight.dtype,
            bias is None or bias.dtype,
        )
        backend = _chosen.get(key) or _choose(key, x, weight, bias, residual)
        if backend == "torch" or backend == "reference":
            if backend == "reference":
                check("layer_norm", x, residual, weight=weight, bias=bias)
            run = (_torch if backend == "torch" else reference).layer_norm
            return run(x, weight, bias, eps, residual=residual)
        if residual is None:
            if is_grad_enabled() and needs_grad(x, weight, bias):
                return _LayerNorm.apply(x, weight, bias, eps, backend)
            forward = (_FORWARD if is_dynamo_compiling() else _DIRECT)[backend]
            return forward(x, weight, bias, eps)
        if is_grad_enabled() and needs_grad(x, weight, bias, residual):
            return _AddLayerNorm.apply(x, residual, weight, bias, eps, backend)
        return _ADD_FORWARD[backend](x, residual, weight, bias, eps)
    except (AttributeError, RuntimeError):
        # the kernel refused: say which argument it was
        check("layer_norm", x, residual, weight=weight, bias=bias)
        raise


_chosen = memory()


def _choose(
    key: tuple[Any, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> str:
    sizes = (
        x.shape,
        residual is not None,
        is_grad_enabled() and needs_grad(x, weight, bias, residual),
    )
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    facts = {
        "weight": None if weight is None else weight.dtype,
        "bias": None if bias is None else bias.dtype,
    }
    return settle("layer_norm", _chosen, key, x, sizes, **facts)
