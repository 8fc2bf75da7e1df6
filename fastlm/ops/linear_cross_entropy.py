"""A linear layer and the cross-entropy of its outputs in one, for large vocabularies.

On the CPU the logits exist for a chunk of rows at a time: made, turned into their own gradient
where they lie, and used for the gradients of x and weight before the next chunk overwrites them.
So the gradients come with the loss, and the backward pass only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks, _torch
from fastlm.ops._library import Function, autocasts, by_backend, define, needs_grad
from fastlm.ops._measured import direction, power
from fastlm.ops._registry import Backend, memory, native, register, settle, triton
from fastlm.ops.cross_entropy import (
    NONE,
    NUMBER,
    ONE,
    SUM,
    check_class_weight,
    check_options,
    check_target,
    check_targets,
    check_token_weight,
    once,
    per_token,
    raised,
    scaled,
)
from fastlm.ops.linear import as_matrix, autocast, size_of

_OP = "linear_cross_entropy"

# Rows of a chunk at the most. Each chunk reads the weights twice and their gradient once, which
# wants many rows; its logits should stay near, which wants few.
_CHUNK_ROWS = 512


def _size_class(shape: torch.Size, classes: int, reduction: str, grad: bool) -> str:
    form = ", per token" if reduction == "none" else ""
    return f"{power(shape[:-1].numel())} x {shape[-1]} x {classes}{form}{direction(grad)}"


register(
    _OP,
    Backend("cpu", ("cpu",), native(torch.float32, torch.bfloat16, torch.float16)),
    triton(native(torch.float32, torch.bfloat16, torch.float16)),
    Backend("torch", (), lambda dtype, **facts: []),  # many logits come chunk by chunk
    classes=_size_class,
)


def _fake(
    x: Tensor, weight: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, dx, dweight, dbias, _, _ = options
    return (
        x.new_empty((target.numel(),) if reduction == NONE else (), dtype=torch.float32),
        x.new_empty(x.shape if dx else 0, dtype=torch.float32),
        x.new_empty(weight.shape if dweight else 0, dtype=torch.float32),
        x.new_empty(weight.shape[0] if dbias else 0, dtype=torch.float32),
    )


# x [rows, H] -> loss, and where wanted the gradients of x, weight and bias, of that number or of
# the sum; fp32, so that the backward pass can scale them before it rounds them
_forward = define(
    f"{_OP}(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight,"
    " Tensor? token_weight, int ignore_index, float smoothing, float z_loss, float softcap,"
    " int reduction, bool dx, bool dweight, bool dbias, int chunk_rows, bool library)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_FORWARD = by_backend(_OP, _forward)


def _run(
    backend: str,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op on the rows of x [..., H], with the product that linear takes for so many."""
    rows = x if x.dim() == 2 else as_matrix(x)
    if target.dim() != 1:
        target = target.reshape(-1)
        token_weight = None if token_weight is None else token_weight.view(-1)
    cut = 0, True  # its table says how many
    if backend != "triton":
        cut = _CHUNK_ROWS, _product(rows, weight, any(options[-3:])) != "cpu"
    tensors = rows, weight, target, bias, class_weight, token_weight
    loss, dx, *others = _FORWARD[backend](*tensors, *options, *cut)
    return loss, dx if dx.dim() == 1 else dx.view_as(x), *others  # [0] where not asked for


_products, _chosen = memory(), memory()


def _product(rows: Tensor, weight: Tensor, grad: bool) -> str:
    """Who multiplies a chunk's rows: what `linear` chooses for so many."""
    key = (rows.is_cpu or rows.device, rows.dtype, size_of(rows))
    facts = {"rows": key[2], "transposed": False}
    sizes = rows.shape, weight.shape, grad, f"in {_OP} "
    return _products.get(key) or settle("linear", _products, key, rows, sizes, **facts)


class _Reduced(Function):
    """The gradients come with the loss; neither x nor weight is kept for them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        backend: str,
        args: tuple[Any, ...],
    ) -> Tensor:
        need = ctx.needs_input_grad[:3]
        units: tuple[Tensor, ...] = ()
        if x.dtype == torch.float16:
            args, units = raised(args)
        target, *others = args
        loss, *gradients = _run(backend, x, weight, target, bias, *others, *need)
        kept = (g for g, n in zip(gradients, need, strict=True) if n)
        ctx.save_for_backward(*units[1:], *kept)
        ctx.dtype, ctx.backend = x.dtype, backend
        return loss * units[0] if units else loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.saved_tensors
        if ctx.dtype == torch.float16:
            unit, *kept = kept
            grad = grad * unit
        gradients = iter(scaled(grad, *kept, backend=ctx.backend))
        need = ctx.needs_input_grad[:3]
        return *(next(gradients).to(ctx.dtype) if n else None for n in need), None, None


class _PerToken(Function):
    """The gradient of weight needs every token's own: the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        backend: str,
        args: tuple[Any, ...],
    ) -> Tensor:
        target, class_weight, token_weight, *ctx.options, _ = args
        ctx.save_for_backward(x, weight, bias, target, class_weight, token_weight)
        ctx.backend = backend
        return _run(backend, x, weight, target, bias, *args[1:], False, False, False)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, target, class_weight, token_weight = ctx.saved_tensors
        tokens, need = per_token(grad, token_weight), ctx.needs_input_grad[:3]
        args = target, bias, class_weight, tokens, *ctx.options, SUM, *need
        with torch.no_grad():
            made: tuple[Tensor, ...] = _run(ctx.backend, x, weight, *args)[1:]
        if torch.is_grad_enabled():
            made = once(ONE, *made)
        grads = (g.to(x.dtype) if n else None for g, n in zip(made, need, strict=True))
        return *grads, None, None


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

    Never holds all logits (but at most 128 MiB, where `fastlm tune` found PyTorch's own operators
    faster). On the CPU, but for fp64, forward and gradients are one pass over
    chunks of rows (see the head of this file); rows with ignore_index are left out from the start,
    so that masked fine-tuning costs only its answers. Logits are rounded to x's dtype, as a linear
    layer's are; gradients are summed in fp32 over all chunks and rounded once. With reduction
    "none" a token's gradient is known only in the backward pass, which makes the logits again:
    exact, at 8/6 of the arithmetic. On a GPU with Triton the chunks have some 4096 rows, those with
    ignore_index among them, for finding them would wait for the device. Elsewhere the chunks are
    PyTorch's operators, their logits made again in the backward pass. Differentiable once in x,
    weight and bias with the first two. Under autocast x, weight and bias are cast to its dtype.
    """
    try:
        if autocasts(x):
            x, weight, bias = autocast(x, weight, bias)
    except AttributeError:
        _checks.tensor(_OP, "x", x)
        raise
    _check(x, weight, target, bias)
    check_options(_OP, label_smoothing, softcap, reduction)
    if class_weight is not None:
        check_class_weight(_OP, "class_weight", class_weight, weight.shape[0], x)
    if token_weight is not None:
        check_token_weight(_OP, token_weight, target)
    key = (x.is_cpu or x.device, x.dtype)
    backend = _chosen.get(key)
    if backend is None:
        sizes = x.shape, weight.shape[0], reduction, needs_grad(x, weight, bias)
        backend = settle(_OP, _chosen, key, x, sizes)
    if backend in ("torch", "reference"):
        check_targets(_OP, target, weight.shape[0], ignore_index)
        return (_torch if backend == "torch" else reference).linear_cross_entropy(
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
    if backend == "triton":
        check_targets(_OP, target, weight.shape[0], ignore_index)
    args = (
        target,
        None if class_weight is None else class_weight.float().contiguous(),
        None if token_weight is None else token_weight.float().contiguous(),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        NUMBER[reduction],
    )
    try:
        if needs_grad(x, weight, bias):
            apply = _PerToken.apply if reduction == "none" else _Reduced.apply
            loss = apply(x, weight, bias, backend, args)
        else:
            loss = _run(backend, x, weight, target, bias, *args[1:], False, False, False)[0]
    except RuntimeError:
        check_targets(_OP, target, weight.shape[0], ignore_index)  # the kernel refused one
        raise
    return loss.view(target.shape) if reduction == "none" else loss


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
