"""layer_norm in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    summed = s = x if residual is None else x + residual
    if any(v is not None and v.dtype != x.dtype for v in (weight, bias)):  # types mixed
        s = s if s.dtype == torch.float64 else s.float()
        weight = None if weight is None else weight.to(s.dtype)
        bias = None if bias is None else bias.to(s.dtype)
    y = F.layer_norm(s, x.shape[-1:], weight, bias, eps).to(x.dtype)
    return y if residual is None else (y, summed)
