"""The matrix product of rows with [out, in] weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import Function, autocasts, direct, needs_grad
from fastlm.ops._measured import direction, power
from fastlm.ops._product import FEW, SOME, grad_w, grad_x, own, winners
from fastlm.ops._registry import Backend, memory, native, register, settle

# How many rows a call has, as the chooser and explain see it.
_FEW, _SOME, _MANY = f"up to {FEW}", f"up to {SOME}", f"over {SOME}"


def cpu_slower(dtype: torch.dtype, *, rows: str, transposed: bool) -> list[str]:
    """Why PyTorch's library is the better choice for so many rows.

    F.linear's time over the own kernel's, weights from memory, [2048, 768], Zen 4 with AVX-512 and
    bf16, 2 threads, for 1 / 4 / 16 rows: fp32 2.6 / 3.1 / 1.8, bf16 1.8 / 2.3 / 1.6; with the
    weight transposed fp32 1.9 / 3.3 / 2.5, bf16 2.3 / 2.5 / 1.4. Beyond 16 rows it is measured
    where it runs (there fp32 about 1.5, bf16 about 1.0, whichever way the weight lies).
    """
    if rows == _FEW:
        return []
    won = winners(dtype)
    return [] if (won.some if rows == _SOME else won.many) else [won.text]


def size_class(inputs: torch.Size, weight: torch.Size, grad: bool, inside: str = "") -> str:
    """The class of a call's sizes: "33-64 x 768 x 2048, with gradients"."""
    rows = power(inputs[:-1].numel())
    return f"{inside}{rows} x {inputs[-1]} x {weight[0]}{direction(grad)}"


register(
    "linear",
    Backend("cpu", ("cpu",), native(torch.float32, torch.bfloat16, torch.float16), cpu_slower),
    Backend("torch", (), lambda dtype, **facts: []),
    classes=size_class,
)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return own(x, w, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        rows = as_matrix(grad)
        dx = grad_x(rows, w).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = grad_w(rows, as_matrix(x)) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x w^T + bias.

    Args:
        x: [..., K], any strides; fp32, bf16, fp16 or fp64.
        w: [N, K], of x's dtype; for speed a matrix with unit stride in either dimension.
        bias: [N], of x's dtype; None for zeros.

    Returns:
        y [..., N] in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        TypeError: an argument that is no floating-point tensor.

    Products and sums are fp32 with one rounding to x's dtype; the own kernel gives the same bits
    for any number of threads. Differentiable in x, w and bias. Under autocast the arguments are
    cast to its dtype. On a CPU the first call with more than 16 rows measures once, for about
    0.1 s (fp16 longer, where PyTorch's is slow), whether the own kernel or PyTorch's library is
    faster for many rows.

    >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    try:
        if autocasts(x):
            x, w, bias = autocast(x, w, bias)
        key = (x.is_cpu or x.device, x.dtype, size_of(x), w.is_contiguous())
        backend = _chosen.get(key) or _choose(key, x, w, bias)
        if backend == "cpu":  # the binding checks the shapes, for calls of a few microseconds
            if is_grad_enabled() and needs_grad(x, w, bias):
                return _Linear.apply(x, w, bias)
            return (own if is_dynamo_compiling() else _own_direct)(x, w, bias)
    except Exception:
        check("linear", x, w, bias)  # names the argument at fault
        raise
    check("linear", x, w, bias)
    if backend == "reference":
        return reference.linear(x, w, bias)
    return F.linear(x, w, bias)


_chosen, _own_direct = memory(), direct(own)


def _choose(key: tuple[Any, ...], x: Tensor, w: Tensor, bias: Tensor | None) -> str:
    sizes = x.shape, w.shape, is_grad_enabled() and needs_grad(x, w, bias)
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    return settle("linear", _chosen, key, x, sizes, rows=key[2], transposed=not key[3])


def size_of(x: Tensor) -> str:
    """How many rows x has, in the three classes that the choice is made for."""
    rows = x.numel() // (x.shape[-1] or 1)
    return _FEW if rows <= FEW else _SOME if rows <= SOME else _MANY


def as_matrix(x: Tensor) -> Tensor:
    """[rows, K] of x [..., K]."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def autocast(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors in the dtype of autocast, which is on for the first one's device."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)  # type: ignore[union-attr]
    return [
        t.to(dtype)  # type: ignore[misc]
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    ]


def check(
    op: str, x: Tensor, w: Tensor, bias: Tensor | None, names: tuple[str, str] = ("w", "bias")
) -> None:
    """Checks that w is [N, K] and bias [N] for x [..., K], all of one dtype and device."""
    _checks.floating(op, "x", x)
    if x.dim() == 0:
        raise _checks.fail(op, "x", "of rank 1 or more", "a scalar")
    _checks.floating(op, names[0], w)
    if w.dim() != 2 or w.shape[1] != x.shape[-1]:
        raise _checks.fail(op, names[0], f"[N, {x.shape[-1]}]", list(w.shape))
    _checks.same_dtype(op, names[0], w, x)
    _checks.same_device(op, names[0], w, x)
    if bias is not None:
        _checks.floating(op, names[1], bias)
        _checks.shape(op, names[1], bias, w.shape[:1])
        _checks.same_dtype(op, names[1], bias, x)
        _checks.same_device(op, names[1], bias, x)
