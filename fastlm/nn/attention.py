"""The attention block of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn.linear import Linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SelfAttention(torch.nn.Module):
    """Causal self-attention with grouped heads and one projection for q, k and v.

    Args:
        hidden: width of x and of the result.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of heads; by default heads.
        head_dim: width of a head; by default hidden / heads.
        bias: whether the q, k, v projection has one.
        out_bias: whether the output projection has one.
        window: sliding window; None for all keys.

    `qkv.weight` holds the rows of q, then k, then v: [(heads + 2 kv_heads) head_dim, hidden].
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        out_bias: bool = False,
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = hidden // heads if head_dim is None else head_dim
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(
                f"SelfAttention: kv_heads must divide heads = {heads}, got {self.kv_heads}"
            )
        self.window = window
        rows = (heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(hidden, rows, bias, device, dtype)
        self.out = Linear(heads * self.head_dim, hidden, out_bias, device, dtype)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        attend: Attend | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden].

        Args:
            x: the normalised input.
            rope: cos and sin of the tokens' positions, [T, w] or [B, T, w].
            mask: as in `fastlm.ops.attention`, beside the causal one.
            attend: computes [B, heads, T, head_dim] from q, k, v in place of causal attention
                among the tokens of x; a cache of earlier keys and values enters here.
            cu_seqlens: [n + 1] int32, for x [1, T, hidden]: where sequences start, packed one after
                the other; none sees another.
        """
        q, k, v = split_heads(self.qkv(x), self.heads, self.kv_heads)
        if rope is not None:
            q, k = ops.rope(q, k, *rope)  # type: ignore[assignment]
        if cu_seqlens is not None:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            out = ops.attention(q, k, v, causal=True, window=self.window, cu_seqlens_q=cu_seqlens)
            return self.out(out.flatten(1)[None])
        if attend is None:
            out = ops.attention(q, k, v, causal=True, window=self.window, mask=mask)
        else:
            out = attend(q, k, v)
        return self.out(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


def split_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, (heads + 2 kv_heads) D] -> views q [B, heads, T, D], k and v [B, kv_heads, T, D]."""
    batch, tokens, width = qkv.shape
    every = heads + 2 * kv_heads
    q, k, v = (
        qkv.view(batch, tokens, every, width // every)
        .transpose(1, 2)
        .split((heads, kv_heads, kv_heads), 1)
    )
    return q, k, v
