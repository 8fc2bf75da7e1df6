"""Cross-entropy losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from fastlm.nn.linear import Linear


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on `fastlm.ops.cross_entropy`: same arguments, same shapes.

    As there, input is [C], [N, C] or [N, C, d1, ...] and target holds class numbers (int64) or,
    which PyTorch's own kernel computes, class probabilities of input's shape.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss, in fp32 for 16-bit logits."""
        if target.is_floating_point():
            return super().forward(input, target)
        return ops.cross_entropy(
            input.movedim(1, -1) if input.dim() > 2 else input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """The cross-entropy of a linear layer's outputs, which need never exist all at once.

    Parameters are named as in torch.nn.LinearCrossEntropyLoss: `linear.weight` [C, H] and, with
    bias, `linear.bias` [C]. For a head that is tied to an embedding call
    `fastlm.ops.linear_cross_entropy` with its weight.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input [..., in_features] and target [...] of class numbers -> the loss."""
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            class_weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )


def next_token_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of predicting labels[:, t + 1] from hidden[:, t].

    Args:
        hidden: [B, T, H].
        head: [V, H].
        labels: [B, T] token numbers; -100 for tokens without loss.
    """
    # the labels are shifted, not the hidden states; the logits never exist all at once
    target = F.pad(labels[:, 1:], (0, 1), value=-100)
    return ops.linear_cross_entropy(hidden, head, target)
