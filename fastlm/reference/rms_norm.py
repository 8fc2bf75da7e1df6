"""rms_norm in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) * (weight + offset), s = x + residual; statistics in fp32."""
    summed = x if residual is None else x + residual
    s = summed if summed.dtype == torch.float64 else summed.float()
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, summed)
