"""cross_entropy in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy over the last dimension, computed in fp32 (fp64 for fp64 logits)."""
    z = logits.reshape(-1, logits.shape[-1])
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    t = target.reshape(-1)
    kept = t != ignore_index
    scale = kept.to(z.dtype)  # what each token's loss is weighted by, and the mean divided by
    class_weight = None
    if weight is not None:
        class_weight = weight.detach().to(z.dtype)
        scale = scale * class_weight[torch.where(kept, t, 0)]
    loss = F.cross_entropy(
        z,
        t,
        class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    if z_loss != 0.0:
        lse = torch.logsumexp(z, -1)
        loss = loss + scale * torch.where(kept, z_loss * lse.square(), 0.0)
    if token_weight is not None:
        tokens = token_weight.detach().reshape(-1).to(z.dtype)
        loss, scale = loss * tokens, scale * tokens
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / scale.sum()
