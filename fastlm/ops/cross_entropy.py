"""Softmax cross-entropy with the options language models are trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register

REDUCTIONS = ("none", "mean", "sum")

register("cross_entropy")


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
    """Cross-entropy of softmax(logits) against class numbers.

    With z = softcap * tanh(logits / softcap) (or z = logits), lse = log(sum(e^z)), t the target,
    e = label_smoothing, w the class weights (or ones), the loss of a token is

        token_weight * (w[t] * ((1 - e) * (lse - z[t]) + z_loss * lse^2)
                        + e / V * sum_c(w[c] * (lse - z[c])))

    and 0 where t is ignore_index. "mean" divides the sum by the sum of token_weight * w[t] over the
    tokens that count, as torch.nn.functional.cross_entropy does; when none counts it is NaN.

    Args:
        logits: [..., V], any strides; fp32, bf16, fp16 or fp64.
        target: [...], int64, each in [0, V) or ignore_index.
        weight: [V] class weights, or None; not differentiable.
        ignore_index: the target of tokens without loss; their gradient is zero.
        label_smoothing: e, in [0, 1].
        z_loss: factor of lse^2, which keeps the logits from drifting.
        softcap: c > 0 bounds the logits to (-c, c); None for no bound.
        token_weight: [...], a weight per token, or None; not differentiable.
        reduction: "none", "mean" or "sum".

    Returns:
        The loss: [...] for "none" (minus the log-probabilities when no option is set), else a
        scalar. fp32 whatever the logits are, but fp64 for fp64.

    Raises:
        ValueError: an option out of range; a shape, dtype or device that does not fit the logits.
        TypeError: an argument of the wrong kind.
        IndexError: a target outside [0, V) that is not ignore_index (on CPU).

    Computed in fp32; a logit of -inf is a class masked out. Differentiable once in logits, whose
    gradient is rounded once to their dtype.
    Source: Szegedy et al., arXiv:1512.00567 (smoothing); Chowdhery et al., arXiv:2204.02311
    (z-loss).
    """
    _check("cross_entropy", logits, target, token_weight)
    check_options("cross_entropy", label_smoothing, softcap, reduction)
    if weight is not None:
        check_class_weight("cross_entropy", "weight", weight, logits.shape[-1], logits)
    choose("cross_entropy", logits)
    return reference.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        token_weight=token_weight,
        reduction=reduction,
    )


def _check(op: str, logits: Tensor, target: Tensor, token_weight: Tensor | None) -> None:
    _checks.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise _checks.fail(op, "logits", "[..., V] with V > 0", list(logits.shape))
    check_target(op, target, logits.shape[:-1], logits)
    if token_weight is not None:
        check_token_weight(op, token_weight, target)


def check_target(op: str, target: Tensor, shape: torch.Size, like: Tensor) -> None:
    """Checks the class numbers of the tokens."""
    _checks.tensor(op, "target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be torch.int64, got {target.dtype}")
    _checks.shape(op, "target", target, shape)
    _checks.same_device(op, "target", target, like)


def check_token_weight(op: str, token_weight: Tensor, target: Tensor) -> None:
    """Checks the weights of the tokens."""
    _checks.floating(op, "token_weight", token_weight)
    _checks.shape(op, "token_weight", token_weight, target.shape)
    _checks.same_device(op, "token_weight", token_weight, target)
    _constant(op, "token_weight", token_weight)


def check_class_weight(op: str, argument: str, value: Tensor, classes: int, like: Tensor) -> None:
    """Checks the weights of the classes."""
    _checks.floating(op, argument, value)
    _checks.shape(op, argument, value, (classes,))
    _checks.same_device(op, argument, value, like)
    _constant(op, argument, value)


def check_options(op: str, label_smoothing: float, softcap: float | None, reduction: str) -> None:
    """Checks the numbers and names among the options."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise _checks.fail(op, "label_smoothing", "in [0, 1]", label_smoothing)
    if softcap is not None and not softcap > 0:
        raise _checks.fail(op, "softcap", "positive or None", softcap)
    if reduction not in REDUCTIONS:
        raise _checks.fail(op, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))


def _constant(op: str, argument: str, value: Tensor) -> None:
    if value.requires_grad:
        raise _checks.fail(op, argument, "without gradient (detach it)", "requires_grad=True")
