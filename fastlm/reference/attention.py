"""Scaled dot-product attention in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(visible(cap(q k^T scale) - slope |p - j| + mask)) v; fp32 or fp64 inside."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = (causal, scale, window, softcap)
    if alibi_slopes is not None:  # before they meet distances, which half precision cannot hold
        alibi_slopes = alibi_slopes.to(torch.promote_types(q.dtype, torch.float32))
    if cu_seqlens_q is None:
        tq, tk = q.shape[2], k.shape[2]
        position = torch.arange(tk - tq, tk, device=q.device)
        seen = _visible(position, torch.arange(tk, device=q.device), causal, window)
        bias = _distances(position, tk, alibi_slopes)
        out, lse = _dense(q, k, v, options, seen, bias, sinks, mask)
    else:
        out, lse = _packed(q, k, v, options, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    return (out, lse) if return_lse else out


def _visible(position: Tensor, key: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """[Tq, Tk], True where the query at `position` sees the key; None where all are seen."""
    ahead = key - position[:, None]
    seen = None
    if causal:
        seen = ahead <= 0
    if window is not None:
        near = (ahead > -window) & (ahead < window)
        seen = near if seen is None else seen & near
    return seen


def _distances(position: Tensor, tk: int, slopes: Tensor | None) -> Tensor | None:
    """-slope |p - j| as [1 or B, Hq, Tq, Tk]."""
    if slopes is None:
        return None
    away = (position[:, None] - torch.arange(tk, device=position.device)).abs()
    return -slopes.view(-1, slopes.shape[-1], 1, 1) * away


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[bool, float, int | None, float | None],
    seen: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _, scale, _, softcap = options
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    queries = q.to(wide).unflatten(1, (k.shape[1], groups))
    scores = queries @ k.to(wide).mT.unsqueeze(2) * scale
    scores = scores.flatten(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)

    # The largest score is a constant to autograd; rows that see nothing divide by one.
    if scores.shape[-1]:
        largest = scores.detach().amax(-1, keepdim=True)
    else:
        largest = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(wide).view(-1, 1, 1)
        largest = torch.maximum(largest, sink.detach())
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - largest)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weights = (weights / total).unflatten(1, (k.shape[1], groups))
    out = (weights @ v.to(wide).unsqueeze(2)).flatten(1, 2)
    lse = (torch.log(total) + largest).masked_fill(empty, -math.inf).squeeze(-1)
    return out.to(q.dtype), lse


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[bool, float, int | None, float | None],
    starts_q: Tensor,
    starts_k: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence after the other; q [total, Hq, D], lse [Hq, total]."""
    causal, _, window, _ = options
    starts_k = starts_q if starts_k is None else starts_k
    ends_q, ends_k = starts_q.tolist(), starts_k.tolist()
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0)]
    for n in range(len(ends_q) - 1):
        rows, cols = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        tq, tk = rows.stop - rows.start, cols.stop - cols.start
        position = torch.arange(tk - tq, tk, device=q.device)
        seen = _visible(position, torch.arange(tk, device=q.device), causal, window)
        slope = slopes[n] if slopes is not None and slopes.dim() == 2 else slopes
        bias = _distances(position, tk, slope)
        heads = [x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[cols], v[cols])]
        out, lse = _dense(heads[0], heads[1], heads[2], options, seen, bias, sinks, None)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    lses[0] = lses[0].to(lses[-1].dtype)
    return torch.cat(outs), torch.cat(lses, -1)
