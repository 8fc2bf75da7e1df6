"""sample in plain PyTorch: oracle and fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The probabilities [B, V] that tokens are drawn with, 0 for what is cut; fp32 or fp64."""
    scores = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    scores = scores / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    p = scores.softmax(-1)
    cut = torch.zeros_like(p, dtype=torch.bool)
    if top_p is not None and top_p < 1:
        ordered = p.sort(-1, descending=True).values
        before = ordered.double().cumsum(-1) - ordered
        # the last one that is needed; what is as likely as it stays too
        last = (before < top_p).sum(-1, keepdim=True) - 1
        cut |= p < ordered.gather(-1, last)
    if min_p is not None:
        cut |= p < min_p * p.amax(-1, keepdim=True)
    p = p.masked_fill(cut, 0)
    return p / p.sum(-1, keepdim=True)


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The first token whose cumulative probability exceeds `uniform`; sums are fp64."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = probabilities(logits, temperature, top_k, top_p, min_p).double().cumsum(-1)
    wanted = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
