"""linear_cross_entropy in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastlm.reference.cross_entropy import cross_entropy


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
