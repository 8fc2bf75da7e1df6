"""The backend "torch": PyTorch's own kernels, in the dtype of the arguments, by reference's names.

Chosen where `fastlm tune` found them faster, or by force. Autograd is PyTorch's. What PyTorch has
no kernel for, each row's `unsupported` names; where the reference is PyTorch's own spelling already
(activation, linear) it serves as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import reference
from fastlm.reference import QuantizedWeight, activation, linear

__all__ = [
    "activation",
    "cross_entropy",
    "decode_attention",
    "gated_activation",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "quantized_linear",
    "rms_norm",
    "rope",
]

# Logits of one call of linear_cross_entropy, in bytes; where there are more, they come in chunks.
MOST_LOGITS = 128 << 20


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.rms_norm, after the addition."""
    summed = x if residual is None else x + _same(x, residual)
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    y = _like(x, torch.rms_norm(summed, x.shape[-1:], weight, eps))
    return y if residual is None else (y, summed)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.layer_norm, after the addition."""
    summed = x if residual is None else x + _same(x, residual)
    y = _like(x, torch.layer_norm(summed, x.shape[-1:], weight, bias, eps))
    return y if residual is None else (y, summed)


def gated_activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """act(gate) * up."""
    return reference.gated_activation(gate, up if up is None else _same(gate, up), kind)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x cos + rotate_half(x) sin, as models write it."""
    rotary = q.shape[-1] if rotary_dim is None else rotary_dim
    if cos.shape[-1] != rotary:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotated(q, cos, sin, rotary), None if k is None else _rotated(k, cos, sin, rotary)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    turned = x if rotary == x.shape[-1] else x[..., :rotary]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), -1)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: int,
    *,
    scale: float | None = None,
    **unused: None,
) -> Tensor:
    """scaled_dot_product_attention over the part of the cache that is filled."""
    return F.scaled_dot_product_attention(
        q,
        k_cache[:, :, :lengths],
        v_cache[:, :, :lengths],
        scale=scale,
        enable_gqa=q.shape[1] != k_cache.shape[1],
    )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    **unused: Any,
) -> Tensor:
    """F.cross_entropy, rounded to the logits' dtype as PyTorch does, then widened."""
    z, t = logits, target
    if z.dim() != 2:
        z, t = z.reshape(-1, z.shape[-1]), t.reshape(-1)
    if weight is not None:
        weight = weight.detach().to(z.dtype)
    loss = F.cross_entropy(
        z,
        t,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if loss.dtype != torch.float64:
        loss = loss.float()
    return loss.reshape(target.shape) if reduction == "none" else loss


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """F.cross_entropy of F.linear; in chunks where the logits are many or an option is not its."""
    logits = target.numel() * weight.shape[0] * x.element_size()
    if logits <= MOST_LOGITS and z_loss == 0.0 and softcap is None is token_weight is class_weight:
        return cross_entropy(F.linear(x, weight, bias), target, **options)
    options |= {"z_loss": z_loss, "softcap": softcap, "token_weight": token_weight}
    return reference.chunked_linear_cross_entropy(
        x, weight, target, bias=bias, class_weight=class_weight, **options
    )


def quantized_linear(
    x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None, activations: str = "exact"
) -> Tensor:
    """F.linear with the weight as it is without quantization, rounded to x's dtype."""
    return F.linear(x, qweight.dequantize(x.dtype), bias)


def _same(x: Tensor, other: Tensor) -> Tensor:
    """The other; RuntimeError, for the facade to explain, where PyTorch would widen either."""
    if other.shape != x.shape or other.dtype != x.dtype:
        raise RuntimeError("the arguments do not fit each other")
    return other


def _like(x: Tensor, y: Tensor) -> Tensor:
    """y in x's dtype, which autocast may have changed."""
    return y if y.dtype == x.dtype else y.to(x.dtype)
