"""layer_norm in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (s - mean) / sqrt(var + eps) * weight + bias, s = x + residual; statistics in fp32."""
    summed = x if residual is None else x + residual
    s = summed if summed.dtype == torch.float64 else summed.float()
    centred = s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = y.to(x.dtype)
    return y if residual is None else (y, summed)
