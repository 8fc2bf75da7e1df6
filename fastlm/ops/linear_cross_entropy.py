"""A linear layer and the cross-entropy of its outputs in one, for large vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import define
from fastlm.ops._registry import choose, register
from fastlm.ops.cross_entropy import (
    check_class_weight,
    check_options,
    check_target,
    check_token_weight,
)

_OP = "linear_cross_entropy"

register(_OP)

# -> loss per row; with `gradient` the logits become the gradient of factor sum_r scale[r] loss[r]
_chunk = define(
    "cross_entropy_chunk(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? scale,"
    " float factor, int ignore_index, float smoothing, float z_loss, float softcap, bool gradient)"
    " -> Tensor",
    lambda logits, target, *others: target.new_empty(target.numel(), dtype=torch.float32),
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, target).

    Args:
        x: [..., H]; fp32, bf16, fp16 or fp64.
        weight: [V, H] of x's dtype, the projection to the vocabulary.
        target: [...], int64, each in [0, V) or ignore_index.
        bias: [V] of x's dtype, or None.
        class_weight: what `cross_entropy` calls weight.
        ignore_index, label_smoothing, z_loss, softcap, token_weight, reduction: as in
            `cross_entropy`.

    Returns:
        The loss, as `cross_entropy` returns it.

    Raises:
        ValueError, TypeError, IndexError: as `cross_entropy`.

    Differentiable once in x, weight and bias.
    """
    _check(x, weight, target, bias)
    check_options(_OP, label_smoothing, softcap, reduction)
    if class_weight is not None:
        check_class_weight(_OP, "class_weight", class_weight, weight.shape[0], x)
    if token_weight is not None:
        check_token_weight(_OP, token_weight, target)
    choose(_OP, x)
    return reference.linear_cross_entropy(
        x,
        weight,
        target,
        bias=bias,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        token_weight=token_weight,
        reduction=reduction,
    )


def _check(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    _checks.floating(_OP, "x", x)
    if x.dim() == 0:
        raise _checks.fail(_OP, "x", "of rank 1 or more", "a scalar")
    _checks.floating(_OP, "weight", weight)
    _checks.rank(_OP, "weight", weight, 2)
    if weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise _checks.fail(_OP, "weight", f"[V, {x.shape[-1]}] with V > 0", list(weight.shape))
    _checks.same_dtype(_OP, "weight", weight, x)
    _checks.same_device(_OP, "weight", weight, x)
    if bias is not None:
        _checks.floating(_OP, "bias", bias)
        _checks.shape(_OP, "bias", bias, weight.shape[:1])
        _checks.same_dtype(_OP, "bias", bias, x)
        _checks.same_device(_OP, "bias", bias, x)
    check_target(_OP, target, x.shape[:-1], x)
