"""Softmax cross-entropy with the options language models are trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import define, needs_grad
from fastlm.ops._registry import Backend, choose, native, register

REDUCTIONS = ("none", "mean", "sum")

_NATIVE = native(torch.float32, torch.bfloat16)


def _cpu_unsupported(dtype: torch.dtype, *, softcap: bool) -> list[str]:
    return _NATIVE(dtype) + (["has no softcap"] if softcap else [])


register("cross_entropy", Backend("cpu", ("cpu",), _cpu_unsupported))


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    rows = target.numel()
    shape = (rows,) if REDUCTIONS[reduction] == "none" else ()
    new = logits.new_empty
    return new(shape, dtype=torch.float32), new((2 * rows + 1,), dtype=torch.float32)


_forward = define(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight,"
    " int ignore_index, float smoothing, float z_loss, int reduction) -> (Tensor, Tensor)",
    _forward_fake,
)
_backward = define(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight,"
    " Tensor? token_weight, Tensor state, int ignore_index, float smoothing,"
    " float z_loss) -> Tensor",
    lambda grad, logits, *others: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *args: Any) -> Tensor:
        weight, token_weight, ignore_index, smoothing, z_loss, _ = args
        loss, state = _forward(logits, target, *args)
        ctx.save_for_backward(logits, target, weight, token_weight, state)
        ctx.options = ignore_index, smoothing, z_loss
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dlogits = _backward(grad, *ctx.saved_tensors, *ctx.options)
        return dlogits, None, None, None, None, None, None, None


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
    if choose("cross_entropy", logits, softcap=softcap is not None) == "reference":
        _check_targets(target, logits.shape[-1], ignore_index)
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
    if weight is not None:
        weight = weight.float()
    if token_weight is not None:
        token_weight = token_weight.float()
    args = weight, token_weight, ignore_index, label_smoothing, z_loss, REDUCTIONS.index(reduction)
    try:
        if needs_grad(logits):
            loss = _CrossEntropy.apply(logits, target, *args)
        else:
            loss = _forward(logits, target, *args)[0]
    except RuntimeError as error:
        raise _target_error(error) from None
    return loss.reshape(target.shape) if reduction == "none" else loss


def _check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """What the kernel checks by itself; on a GPU it would have to wait for the values."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        position = int(wrong.reshape(-1).nonzero()[0])
        got = f"{int(target.reshape(-1)[position])} at position {position}"
        expected = f"in [0, {classes}) or ignore_index {ignore_index}"
        raise IndexError(f"cross_entropy: target must be {expected}, got {got}")


def _target_error(error: RuntimeError) -> Exception:
    """The kernel reads every target before it writes anything; its complaint, as an IndexError."""
    text = str(error)
    found = text.find("cross_entropy: target must be")
    return IndexError(text[found:]) if found >= 0 else error


def _check(op: str, logits: Tensor, target: Tensor, token_weight: Tensor | None) -> None:
    if (
        isinstance(logits, Tensor)
        and isinstance(target, Tensor)
        and logits.dtype in _checks.FLOATS
        and target.dtype == torch.int64
        and logits.dim() > 0
        and target.shape == logits.shape[:-1]
        and logits.shape[-1] > 0
        and target.device == logits.device
        and token_weight is None
    ):
        return
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
