"""Layer normalisation, with the residual addition before it fused in."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register

register("layer_norm")


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
    input gives the same bits for any number of threads. Differentiable once.
    Source: Ba, Kiros and Hinton, arXiv:1607.06450.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), eps=0.0)
    tensor([[-1.,  1.]])
    """
    _check(x, weight, bias, residual)
    choose("layer_norm", x)
    return reference.layer_norm(x, weight, bias, eps, residual=residual)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    _checks.floating("layer_norm", "x", x)
    if x.dim() == 0:
        raise _checks.fail("layer_norm", "x", "of rank 1 or more", "a scalar")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _checks.floating("layer_norm", name, vector)
            _checks.shape("layer_norm", name, vector, x.shape[-1:])
            _checks.same_device("layer_norm", name, vector, x)
    if residual is not None:
        _checks.floating("layer_norm", "residual", residual)
        _checks.shape("layer_norm", "residual", residual, x.shape)
        _checks.same_dtype("layer_norm", "residual", residual, x)
        _checks.same_device("layer_norm", "residual", residual, x)
