"""decode_attention in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the first lengths[b] keys, query i at lengths[b] - Tq + i.

    Computed one precision up: half precision in fp32, fp32 in fp64.
    """
    wide = torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32
    if k_scale is not None and v_scale is not None:
        k_cache = k_cache.to(wide) * k_scale.to(wide).unsqueeze(-1)
        v_cache = v_cache.to(wide) * v_scale.to(wide).unsqueeze(-1)
    if block_table is not None:
        k_cache, v_cache = (_gather(cache, block_table) for cache in (k_cache, v_cache))
    batch, heads, queries, size = q.shape
    kv_heads, keys = k_cache.shape[1:3]
    if not isinstance(lengths, Tensor):
        lengths = torch.full((batch,), lengths, device=q.device)

    at = torch.arange(keys, device=q.device)
    valid = at < lengths[:, None]  # [B, S]
    valid_rows = valid[:, None, :, None]
    # What lies beyond a sequence's length may be anything, NaN too; it must not reach a product.
    k, v = (torch.where(valid_rows, cache.to(wide), 0.0) for cache in (k_cache, v_cache))
    position = lengths[:, None] - queries + torch.arange(queries, device=q.device)  # [B, Tq]
    ahead = at - position[..., None]  # [B, Tq, S], at most 0 for the keys a query may see
    visible = valid[:, None, :] & (ahead <= 0)
    if window is not None:
        visible &= ahead > -window

    # The queries that share a key's head are rows of one product: [B, Hkv, Hq / Hkv * Tq, D].
    rows = q.to(wide).reshape(batch, kv_heads, heads // kv_heads * queries, size)
    scores = rows @ k.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    scores = scores.view(batch, heads, queries, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(wide)[..., None, None] * ahead[:, None]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).view(-1, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat((scores, column), -1)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    weights = torch.softmax(torch.where(seen, scores, 0.0), -1)
    weights = torch.where(seen, weights, 0.0)[..., :keys].reshape(*rows.shape[:3], keys)
    return (weights @ v).view(batch, heads, queries, v.shape[3]).to(q.dtype)


def _gather(cache: Tensor, block_table: Tensor) -> Tensor:
    """Pages [blocks, Hkv, size, D] in the order of block_table [B, n] -> [B, Hkv, n * size, D]."""
    pages = cache[block_table.clamp(min=0).long()]  # entries beyond the length may be -1
    return pages.transpose(1, 2).flatten(2, 3)
