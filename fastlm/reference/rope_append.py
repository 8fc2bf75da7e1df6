"""rope_append in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.reference.rope import rope


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    *,
    block_table: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> Tensor:
    """Normalises, rotates and stores; everything between is one precision up."""
    batch, heads, tokens, _ = k.shape
    device, wide = q.device, torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(lengths, Tensor):
        lengths = torch.full((batch,), lengths, device=device)
    at = lengths.long()[:, None] - tokens + torch.arange(tokens, device=device)  # [B, T]
    y, z = _normalised(q.to(wide), q_weight, eps, weight_offset), k.to(wide)
    z = _normalised(z, k_weight, eps, weight_offset)
    if cos is not None and sin is not None:
        turned = rope(y, z, cos[at], sin[at], interleaved=interleaved, rotary_dim=rotary_dim)
        y, z = turned[0], z if turned[1] is None else turned[1]
    if block_table is None:
        row, place = torch.arange(batch, device=device)[:, None], at
    else:
        size = k_cache.shape[2]
        row, place = block_table.long().gather(1, at // size), at % size
    # [B, 1, T], [1, H, 1], [B, 1, T]: places of [B, H, T, D]
    where = row[:, None], torch.arange(heads, device=device)[:, None], place[:, None]
    k_cache[where] = z.to(k_cache.dtype)
    v_cache[where] = v
    return y.to(q.dtype)


def _normalised(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.to(x.dtype) + offset)
