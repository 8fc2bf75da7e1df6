"""rope in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Each pair (x1, x2) becomes (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2); computed in fp32."""
    rotary = rotated_width(q.shape[-1], cos.shape[-1], rotary_dim)
    cos, sin = (_per_pair(table, rotary, interleaved) for table in (cos, sin))
    y = _rotate(q, cos, sin, rotary, interleaved)
    return y, None if k is None else _rotate(k, cos, sin, rotary, interleaved)


def rope_(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """rope, whose results take the place of q and k."""
    y, z = rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)
    return q.copy_(y), None if k is None or z is None else k.copy_(z)


def rotated_width(head: int, table: int, rotary_dim: int | None) -> int:
    """How many of `head` elements tables of a width rotate: tables hold R or R / 2 angles."""
    if rotary_dim is not None:
        return rotary_dim
    return head if 2 * table == head else table


def _per_pair(table: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """[..., T, R or R/2] -> [2, ..., 1, T, R/2]: the table of the first and the second element."""
    if table.shape[-1] != rotary:
        halves = (table, table)
    elif interleaved:
        halves = (table[..., 0::2], table[..., 1::2])
    else:
        halves = (table[..., : rotary // 2], table[..., rotary // 2 :])
    return torch.stack(halves).unsqueeze(-3)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    turned, rest = x[..., :rotary].to(wide), x[..., rotary:]
    if interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
    else:
        x1, x2 = turned.chunk(2, -1)
    cos, sin = cos.to(wide), sin.to(wide)
    y1, y2 = x1 * cos[0] - x2 * sin[0], x2 * cos[1] + x1 * sin[1]
    turned = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
