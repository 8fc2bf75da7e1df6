"""Pointwise activations, plain and gated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _checks, _torch
from fastlm.ops._library import Function, again, by_backend, define, direct, needs_grad, twice
from fastlm.ops._measured import direction, rows
from fastlm.ops._registry import Backend, memory, native, plain, register, settle, triton

# in the order of csrc/ops/activation_kind.h
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _size_class(kind: str, form: str, shape: torch.Size, grad: bool) -> str:
    return f"{form}{kind} {rows(shape)}{direction(grad)}"


register(
    "activation",
    Backend("cuda", ("cuda",), native(torch.float32, torch.bfloat16)),
    Backend("cpu", ("cpu",), native(torch.float32, torch.bfloat16, torch.float16)),
    triton(native(torch.float32, torch.bfloat16, torch.float16)),
    plain(native(*_checks.FLOATS)),
    classes=_size_class,
)


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

_FORWARD, _BACKWARD = by_backend("activation", _forward), by_backend("activation", _backward)
_GATED = by_backend("activation", _gated)
_GATED_BACKWARD = by_backend("activation", _gated_backward)
_PACKED = by_backend("activation", _packed)
_PACKED_BACKWARD = by_backend("activation", _packed_backward)
_DIRECT = {name: direct(operator) for name, operator in _FORWARD.items()}
_GATED_DIRECT = {name: direct(operator) for name, operator in _GATED.items()}


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.backend = kind, backend
        return _FORWARD[backend](x, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None]:  # type: ignore[override]
        if twice():
            kind = KINDS[ctx.kind]
            run = again(lambda x: reference.activation(x, kind), ctx.saved_tensors, (True,), grad)
            return run[0], None, None
        return _BACKWARD[ctx.backend](grad, *ctx.saved_tensors, ctx.kind), None, None


class _GatedActivation(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: int, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.backend = kind, backend
        return _GATED[backend](gate, up, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if twice():
            gate, up = ctx.saved_tensors
            return *_gated_again(ctx, gate, up, grad), None, None
        return *_GATED_BACKWARD[ctx.backend](grad, *ctx.saved_tensors, ctx.kind), None, None


class _PackedActivation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.backend = kind, backend
        return _PACKED[backend](x, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None]:  # type: ignore[override]
        if twice():
            (x,) = ctx.saved_tensors
            return (
                _gated_again(ctx, x, None, grad.view(*x.shape[:-1], x.shape[-1] // 2))[0],
                None,
                None,
            )
        return _PACKED_BACKWARD[ctx.backend](grad, *ctx.saved_tensors, ctx.kind), None, None


def _gated_again(ctx: Any, gate: Tensor, up: Tensor | None, grad: Tensor) -> list[Any]:
    def function(gate: Tensor, up: Tensor | None) -> Tensor:
        return reference.gated_activation(gate, up, KINDS[ctx.kind])

    return again(function, (gate, up), ctx.needs_input_grad[: 1 if up is None else 2], grad)


# Calls of a few microseconds: the kernel checks the shapes, and only a refusal is looked into.
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_chosen = memory()


def _choose(x: Tensor, kind: str, form: str = "", up: Tensor | None = None) -> str:
    key = (x.is_cpu or x.device, x.dtype)
    sizes = kind, form, x.shape, is_grad_enabled() and needs_grad(x, up)
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    return settle("activation", _chosen, key, x, sizes)


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

    Computed in fp32 with one rounding to x's dtype. Differentiable, a second time by PyTorch's own
    operators.
    Source: Hendrycks and Gimpel, arXiv:1606.08415 (gelu, silu); So et al., arXiv:2109.08668
    (relu2).
    """
    try:
        backend = _chosen.get((x.is_cpu or x.device, x.dtype)) or _choose(x, kind)
        if backend in _FORWARD:
            if is_grad_enabled() and x.requires_grad:
                return _Activation.apply(x, _NUMBERS[kind], backend)
            return (_FORWARD if is_dynamo_compiling() else _DIRECT)[backend](x, _NUMBERS[kind])
        if backend == "torch" and kind in _NUMBERS:
            return _torch.activation(x, kind)
    except (AttributeError, KeyError, TypeError):
        _check("activation", x, kind)  # names the argument at fault
        raise
    _check("activation", x, kind)
    return reference.activation(x, kind)


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

    Computed in fp32 with one rounding to gate's dtype. Differentiable in gate and up, a second time
    by PyTorch's own operators.
    Source: Shazeer, arXiv:2002.05202.
    """
    try:
        backend = _chosen.get((gate.is_cpu or gate.device, gate.dtype))
        if backend is None:
            backend = _choose(gate, kind, "packed " if up is None else "gated ", up)
        if backend in _FORWARD:
            if up is None:
                return _packed_halves(gate, kind, backend)
            if is_grad_enabled() and (gate.requires_grad or up.requires_grad):
                return _GatedActivation.apply(gate, up, _NUMBERS[kind], backend)
            run = (_GATED if is_dynamo_compiling() else _GATED_DIRECT)[backend]
            return run(gate, up, _NUMBERS[kind])
        if backend == "torch" and kind in _NUMBERS:
            return _torch.gated_activation(gate, up, kind)
    except (AttributeError, KeyError, TypeError, RuntimeError):
        _check_gated(gate, up, kind)  # names the argument at fault
        raise
    _check_gated(gate, up, kind)
    return reference.gated_activation(gate, up, kind)


def _packed_halves(x: Tensor, kind: str, backend: str) -> Tensor:
    _check_gated(x, None, kind)
    number = _NUMBERS[kind]
    if needs_grad(x):
        y = _PackedActivation.apply(x, number, backend)
    else:
        y = _PACKED[backend](x, number)
    return y.reshape(*x.shape[:-1], x.shape[-1] // 2)


def _check(op: str, x: Tensor, kind: str) -> None:
    _checks.floating(op, "x", x)
    _check_kind(op, kind)


def _check_gated(gate: Tensor, up: Tensor | None, kind: str) -> None:
    op = "gated_activation"
    _checks.floating(op, "gate", gate)
    _check_kind(op, kind)
    if up is not None:
        _checks.floating(op, "up", up)
        _checks.shape(op, "up", up, gate.shape)
        _checks.same_dtype(op, "up", up, gate)
        _checks.same_device(op, "up", up, gate)
    elif gate.dim() == 0 or gate.shape[-1] % 2:
        expected = "[..., 2F] with an even last size when up is None"
        raise _checks.fail(op, "gate", expected, list(gate.shape))


def _check_kind(op: str, kind: str) -> None:
    if kind not in KINDS:
        raise _checks.fail(op, "kind", f"one of {', '.join(KINDS)}", repr(kind))
