"""linear_cross_entropy in plain PyTorch: oracle, and for large vocabularies chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlm.reference.cross_entropy import cross_entropy

CHUNK_BYTES = 20 << 20  # of a chunk's logits, of which some copies exist


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, target), every logit held at once."""
    return cross_entropy(F.linear(x, weight, bias), target, weight=class_weight, **options)


def chunked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """The same, a chunk of rows at a time; the backward pass makes a chunk's logits again."""
    options |= {"class_weight": class_weight, "ignore_index": ignore_index, "reduction": "none"}

    def losses(x: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, **options)

    rows, t = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    size = max(16, CHUNK_BYTES // (weight.shape[0] * x.element_size()))
    parts = [
        checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(rows.split(size), t.split(size), strict=True)
    ]
    loss = torch.cat(parts)
    kept = t != ignore_index
    scale = kept.to(loss.dtype)  # as in cross_entropy
    if class_weight is not None:
        scale = scale * class_weight.detach().to(loss.dtype)[torch.where(kept, t, 0)]
    if token_weight is not None:
        tokens = token_weight.detach().reshape(-1).to(loss.dtype)
        loss, scale = loss * tokens, scale * tokens
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / scale.sum()
