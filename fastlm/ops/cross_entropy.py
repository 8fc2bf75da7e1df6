"""Softmax cross-entropy with the options language models are trained with."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from fastlm import _ext, reference
from fastlm.ops import _checks, _torch
from fastlm.ops._library import Function, by_backend, define, direct, needs_grad
from fastlm.ops._measured import direction, rows
from fastlm.ops._registry import Backend, memory, native, plain, register, settle, triton

REDUCTIONS = ("none", "mean", "sum")
NUMBER = {name: number for number, name in enumerate(REDUCTIONS)}
NONE, MEAN, SUM = range(3)
ONE = torch.ones((), device="cpu")


def torch_unsupported(dtype: torch.dtype, *, options: tuple[str, ...]) -> list[str]:
    """What F.cross_entropy lacks."""
    return [f"has no {name}" for name in options]


def torch_lacks(
    z_loss: float, softcap: float | None, token_weight: Tensor | None
) -> tuple[str, ...]:
    """The options of a call that F.cross_entropy has not, as the chooser sees them."""
    given = {"z_loss": z_loss, "softcap": softcap, "token_weight": token_weight is not None}
    return tuple(name for name, value in given.items() if value)


def _size_class(lacks: tuple[str, ...], shape: torch.Size, reduction: str, grad: bool) -> str:
    return rows(shape) + (", per token" if reduction == "none" else "") + direction(grad)


register(
    "cross_entropy",
    Backend("cuda", ("cuda",), native(torch.float32, torch.bfloat16)),
    Backend("cpu", ("cpu",), native(torch.float32, torch.bfloat16, torch.float16)),
    triton(native(torch.float32, torch.bfloat16, torch.float16)),
    plain(torch_unsupported),
    classes=_size_class,
)


def _fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((target.numel(),) if reduction == NONE else (), dtype=torch.float32)
    return loss, logits.new_empty(logits.shape if gradient else 0)


# -> loss, gradient of that number (of the sum where the tokens' losses are returned) or empty
_cross_entropy = define(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight,"
    " int ignore_index, float smoothing, float z_loss, float softcap, int reduction, bool gradient)"
    " -> (Tensor, Tensor)",
    _fake,
)
_CROSS_ENTROPY = by_backend("cross_entropy", _cross_entropy)
_DIRECT = {name: direct(operator) for name, operator in _CROSS_ENTROPY.items()}


class _Reduced(Function):
    """The gradient comes with the loss, in one visit to the logits, which are then not kept.

    What is not differentiable comes as one tuple: that saves 3 us a step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend: str, args: tuple[Any, ...]) -> Tensor:
        ctx.backend = backend
        if logits.dtype != torch.float16:
            loss, gradient = _CROSS_ENTROPY[backend](logits, *args, True)
            ctx.save_for_backward(gradient)
            return loss
        args, (loss_unit, unit) = raised(args)
        loss, gradient = _CROSS_ENTROPY[backend](logits, *args, True)
        ctx.save_for_backward(gradient, unit)
        return loss * loss_unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient, *unit = ctx.saved_tensors
        if unit:
            grad = grad * unit[0]
        return *scaled(grad, gradient, backend=ctx.backend), None, None


class _PerToken(Function):
    """The gradient needs the tokens' own, so the logits are kept and visited again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend: str, args: tuple[Any, ...]) -> Tensor:
        target, weight, token_weight, *ctx.options, _ = args
        ctx.save_for_backward(logits, target, weight, token_weight)
        ctx.backend = backend
        return _CROSS_ENTROPY[backend](logits, *args, False)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, weight, token_weight = ctx.saved_tensors
        args = target, weight, per_token(grad, token_weight), *ctx.options, SUM, True
        with torch.no_grad():
            gradient = _CROSS_ENTROPY[ctx.backend](logits, *args)[1]
        return once(ONE, gradient)[0] if is_grad_enabled() else gradient, None, None


def per_token(grad: Tensor, token_weight: Tensor | None) -> Tensor:
    """What each token's loss counts in the gradient, contiguous."""
    return grad.contiguous() if token_weight is None else token_weight.reshape(-1) * grad


def raised(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    """Arguments whose gradients fp16 can hold; what loss and gradients are then multiplied with.

    Gradients come with the loss, before the scale that fp16 losses are given is known, and a
    logit's share of a mean over many tokens is below the smallest fp16. So the tokens are weighted
    by the power of two that takes the largest gradient to the upper end of fp16: multiplying by a
    power of two rounds nothing.
    """
    target, weight, token_weight, *others, reduction = args
    if target.numel() == 0:
        return args, (ONE, ONE)
    ignore_index, _, z_loss, softcap = others
    # a logit's slope is at most 2 w (1 + z_loss |lse|), and |lse| the largest logit and log V
    slope = 2.0 + 2.0 * z_loss * (min(softcap or 65504.0, 65504.0) + 32.0)
    if token_weight is None and weight is None and target.is_cpu and not is_dynamo_compiling():
        # in Python's numbers: a tenth of the time, which counts for a few tokens
        count = int((target != ignore_index).sum()) if reduction == MEAN else 1
        share = 1.0 / max(count, 1)
        power = 2.0 ** math.ceil(math.log2(slope * share / 32768.0))
        unit = torch.tensor(power)
        tokens = torch.full(target.shape, share / power)
        none = unit if count else torch.tensor(math.nan)
        return (target, None, tokens, *others, SUM), (none, unit)
    tokens = token_weight
    if tokens is None:
        tokens = torch.ones(target.shape, dtype=torch.float32, device=target.device)
    total = torch.ones_like(ONE)
    if reduction == MEAN:
        counted = torch.where(target == ignore_index, 0.0, tokens.double())
        if weight is not None:
            counted = counted * weight[target.clamp(0, len(weight) - 1)]
        total = counted.sum()
    shares = tokens / torch.where(total == 0, 1.0, total).float()
    largest = shares.abs().amax() * slope
    if weight is not None:
        largest = largest * weight.abs().amax()
    unit = (largest.clamp(2.0**-60) / 32768.0).log2().ceil().exp2()
    none = torch.where(total == 0, torch.nan, unit)  # the mean of no loss
    return (target, weight, shares / unit, *others, SUM), (none, unit)


def scaled(factor: Tensor, *gradients: Tensor, backend: str = "cpu") -> tuple[Tensor, ...]:
    """Gradients made beforehand, times the gradient of the loss, inside a backward function.

    It is one as a rule, and a graph that is not kept lets go of what it saved: then the gradients
    are handed out as they are, or scaled where they lie.
    """
    if is_dynamo_compiling():
        return tuple(_times(g, factor) for g in gradients)
    if is_grad_enabled():
        return once(factor, *gradients)
    if _keeps_graph():
        return tuple(_times(g, factor) for g in gradients)
    if backend == "triton" or (backend == "cuda" and not _ext.triton_error()):
        # looks at the factor where it lies
        scale_ = importlib.import_module("fastlm.triton.cross_entropy").scale_
        return tuple(scale_(g, factor) for g in gradients)
    if not factor.is_cpu:
        return tuple(_times(g, factor) for g in gradients)
    number = factor.item()
    return gradients if number == 1.0 else tuple(g.mul_(number) for g in gradients)


def once(factor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The gradients times `factor` where they may be differentiated again: that then raises.

    Without the leaf they would pass for constants, and a second derivative for zero.
    """
    made = _once(None, factor.detach().requires_grad_(), *gradients)
    return made if isinstance(made, tuple) else (made,)


@once_differentiable
def _once(ctx: None, factor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple(_times(g, factor) for g in gradients)


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    if gradient.dtype != torch.float16:
        return gradient * factor
    return (gradient.float() * factor).to(gradient.dtype)  # a factor may be too small for fp16


# True where PyTorch does not tell
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


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
        IndexError: a target outside [0, V) that is not ignore_index (on CPU; on a GPU, where
            looking at the targets would wait for them, the loss of such a token is NaN).

    Computed in fp32; a logit of -inf is a class masked out. Differentiable once in logits. Their
    gradient is rounded once to their dtype (where `fastlm tune` found PyTorch's own kernel
    faster, the loss too); where a reduced loss is not the end of the graph (its
    own gradient is not one), the product with it is rounded again.
    Source: Szegedy et al., arXiv:1512.00567 (smoothing); Chowdhery et al., arXiv:2204.02311
    (z-loss).
    """
    try:
        key = (logits.is_cpu or logits.device, logits.dtype)
        backend = _chosen.get(key)
        if backend is None:
            plain = z_loss == 0.0 and softcap is None is token_weight
            lacks = () if plain else torch_lacks(z_loss, softcap, token_weight)
            backend = _choose(key, logits, lacks, reduction)
        if backend in _CROSS_ENTROPY and (
            (weight is None or _plain(weight, logits.shape[-1:]))
            and (token_weight is None or _plain(token_weight, target.shape))
        ):
            # the binding checks shapes and (on CPU) targets, for calls of a few microseconds
            if not 0.0 <= label_smoothing <= 1.0 or (
                softcap is not None and not 0.0 < softcap < math.inf
            ):
                raise ValueError
            if backend == "triton":
                check_targets("cross_entropy", target, logits.shape[-1], ignore_index)
            args = (
                target,
                weight,
                token_weight,
                ignore_index,
                label_smoothing,
                z_loss,
                softcap or 0.0,
                NUMBER[reduction],
            )
            if reduction == "none":
                if needs_grad(logits):
                    return _PerToken.apply(logits, backend, args).view(target.shape)
                return _CROSS_ENTROPY[backend](logits, *args, False)[0].view(target.shape)
            if logits.requires_grad and is_grad_enabled():
                return _Reduced.apply(logits, backend, args)
            op = (_CROSS_ENTROPY if is_dynamo_compiling() else _DIRECT)[backend]
            return op(logits, *args, False)[0]
        if backend == "torch" and weight is None and target.shape == logits.shape[:-1]:
            return _torch.cross_entropy(
                logits,
                target,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction=reduction,
            )
    except Exception as error:
        _check(logits, target, weight, token_weight, label_smoothing, softcap, reduction)
        if isinstance(error, IndexError):  # PyTorch's own, which does not say where
            check_targets("cross_entropy", target, logits.shape[-1], ignore_index)
        raise _target_error(error) from None
    _check(logits, target, weight, token_weight, label_smoothing, softcap, reduction)
    if backend in _CROSS_ENTROPY:
        weight = None if weight is None else weight.float().contiguous()
        token_weight = None if token_weight is None else token_weight.float().contiguous()
        return cross_entropy(
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
    check_targets("cross_entropy", target, logits.shape[-1], ignore_index)
    return (_torch if backend == "torch" else reference).cross_entropy(
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


_chosen = memory()


def _choose(key: tuple[Any, ...], logits: Tensor, lacks: tuple[str, ...], reduction: str) -> str:
    sizes = lacks, logits.shape, reduction, is_grad_enabled() and needs_grad(logits)
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    return settle("cross_entropy", _chosen, key, logits, sizes, options=lacks)


def _plain(weight: Tensor, shape: torch.Size) -> bool:
    """Whether the kernel can read these weights as they are; it looks at their number only."""
    return (
        weight.dtype == torch.float32
        and weight.shape == shape
        and weight.is_contiguous()
        and not weight.requires_grad
    )


def check_targets(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """What the kernel checks by itself; on a GPU it would have to wait for the values."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        position = int(wrong.reshape(-1).nonzero()[0])
        got = f"{int(target.reshape(-1)[position])} at position {position}"
        expected = f"in [0, {classes}) or ignore_index {ignore_index}"
        raise IndexError(f"{op}: target must be {expected}, got {got}")


def _target_error(error: Exception) -> Exception:
    """The kernel reads every target before it writes anything; its complaint, as an IndexError."""
    text = str(error)
    found = text.find("cross_entropy: target must be")
    return IndexError(text[found:]) if found >= 0 else error


def _check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
) -> None:
    op = "cross_entropy"
    _checks.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise _checks.fail(op, "logits", "[..., V] with V > 0", list(logits.shape))
    check_target(op, target, logits.shape[:-1], logits)
    if token_weight is not None:
        check_token_weight(op, token_weight, target)
    check_options(op, label_smoothing, softcap, reduction)
    if weight is not None:
        check_class_weight(op, "weight", weight, logits.shape[-1], logits)


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
    if softcap is not None and not 0 < softcap < math.inf:
        raise _checks.fail(op, "softcap", "positive and finite, or None", softcap)
    if reduction not in REDUCTIONS:
        raise _checks.fail(op, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))


def _constant(op: str, argument: str, value: Tensor) -> None:
    if value.requires_grad:
        raise _checks.fail(op, argument, "without gradient (detach it)", "requires_grad=True")
