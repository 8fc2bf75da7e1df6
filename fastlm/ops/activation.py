"""Pointwise activations, plain and gated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import define, needs_grad
from fastlm.ops._registry import Backend, choose, native, register

# in the order of csrc/ops/activation_kind.h
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

register("activation", Backend("cpu", ("cpu",), native(torch.float32, torch.bfloat16)))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = define("activation(Tensor x, int kind) -> Tensor", lambda x, kind: _like(x))
_backward = define(
    "activation_backward(Tensor grad, Tensor x, int kind) -> Tensor",
    lambda grad, x, kind: _like(x),
)
_gated = define(
    "gated_activation(Tensor gate, Tensor up, int kind) -> Tensor",
    lambda gate, up, kind: _like(gate),
)
_gated_backward = define(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)",
    lambda grad, gate, up, kind: (_like(gate), _like(up)),
)
_packed = define(
    "packed_activation(Tensor x, int kind) -> Tensor",
    lambda x, kind: x.new_empty((x[..., 0].numel(), x.shape[-1] // 2)),
)
_packed_backward = define(
    "packed_activation_backward(Tensor grad, Tensor x, int kind) -> Tensor",
    lambda grad, x, kind: _like(x),
)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _forward(x, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _backward(grad, *ctx.saved_tensors, ctx.kind), None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gated(gate, up, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return *_gated_backward(grad, *ctx.saved_tensors, ctx.kind), None


class _PackedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _packed(x, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _packed_backward(grad, *ctx.saved_tensors, ctx.kind), None


def activation(x: Tensor, kind: str) -> Tensor:
    """y = act(x), element by element.

    Args:
        x: any shape and strides; fp32, bf16, fp16 or fp64.
        kind: "silu" x / (1 + e^-x), "gelu" x * Phi(x) by erf, "gelu_tanh" its tanh form,
            "relu" max(x, 0), "relu2" max(x, 0)^2.

    Returns:
        y like x, contiguous.

    Raises:
        ValueError: an unknown kind.
        TypeError: x is no floating-point tensor.

    Computed in fp32 with one rounding to x's dtype. Differentiable once.
    Source: Hendrycks and Gimpel, arXiv:1606.08415 (gelu, silu); So et al., arXiv:2109.08668
    (relu2).
    """
    _checks.floating("activation", "x", x)
    _check_kind("activation", kind)
    if choose("activation", x) == "reference":
        return reference.activation(x, kind)
    run = _Activation.apply if needs_grad(x) else _forward
    return run(x, KINDS.index(kind))


def gated_activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """y = act(gate) * up: SwiGLU ("silu"), GeGLU ("gelu", "gelu_tanh"), ReGLU ("relu").

    Args:
        gate: [..., F], any strides; fp32, bf16, fp16 or fp64. Halves of one tensor
            (`x.chunk(2, -1)`) are read where they lie.
        up: like gate; None when `gate` is [..., 2F] and holds gate and up side by side, which
            spares the backward pass a concatenation.
        kind: as in `activation`.

    Returns:
        y: [..., F] of gate's dtype, contiguous.

    Raises:
        ValueError: an unknown kind, or an `up` that does not fit gate.
        TypeError: an argument that is no floating-point tensor.

    Computed in fp32 with one rounding to gate's dtype. Differentiable once in gate and up.
    Source: Shazeer, arXiv:2002.05202.
    """
    _checks.floating("gated_activation", "gate", gate)
    _check_kind("gated_activation", kind)
    if up is not None:
        _checks.floating("gated_activation", "up", up)
        _checks.shape("gated_activation", "up", up, gate.shape)
        _checks.same_dtype("gated_activation", "up", up, gate)
        _checks.same_device("gated_activation", "up", up, gate)
    elif gate.dim() == 0 or gate.shape[-1] % 2:
        expected = "[..., 2F] with an even last size when up is None"
        raise _checks.fail("gated_activation", "gate", expected, list(gate.shape))
    if choose("activation", gate) == "reference":
        return reference.gated_activation(gate, up, kind)
    number = KINDS.index(kind)
    if up is not None:
        run = _GatedActivation.apply if needs_grad(gate, up) else _gated
        return run(gate, up, number)
    run = _PackedActivation.apply if needs_grad(gate) else _packed
    return run(gate, number).reshape(*gate.shape[:-1], gate.shape[-1] // 2)


def _check_kind(op: str, kind: str) -> None:
    if kind not in KINDS:
        raise _checks.fail(op, "kind", f"one of {', '.join(KINDS)}", repr(kind))
