"""The feed-forward block of a decoder layer: two or three linear maps around an activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import Function, again, autocasts, by_backend, define, needs_grad
from fastlm.ops._measured import direction, power
from fastlm.ops._product import grad_w, grad_x, own
from fastlm.ops._registry import Backend, absent, memory, native, register, settle, triton
from fastlm.ops.activation import KINDS as KINDS
from fastlm.ops.linear import as_matrix, autocast, cpu_slower, size_of
from fastlm.ops.linear import check as check_linear

_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_NATIVE = native(torch.float32, torch.bfloat16, torch.float16)


def _torch_unsupported(dtype: torch.dtype, **facts: Any) -> list[str]:
    return _NATIVE(dtype) or absent("activation", Backend("cpu", (), _NATIVE), "cpu")


def _triton_unsupported(dtype: torch.dtype, **facts: Any) -> list[str]:
    return native(torch.float32, torch.bfloat16, torch.float16)(dtype)


def _torch_slower(dtype: torch.dtype, **facts: Any) -> list[str]:
    compiling = torch.compiler.is_compiling()
    return ["the compiler fuses PyTorch's own activation"] if compiling else []


def _size_class(x: torch.Size, w_in: torch.Size, outputs: int, gated: bool, grad: bool) -> str:
    rows, form = power(x[:-1].numel()), "gated " if gated else ""
    return f"{form}{rows} x {x[-1]} x {w_in[0]} x {outputs}{direction(grad)}"


register(
    "feed_forward",
    Backend("cpu", ("cpu",), _NATIVE, cpu_slower),
    Backend("torch", ("cpu",), _torch_unsupported, _torch_slower),  # its products, our activation
    triton(_triton_unsupported, _torch_slower),
    classes=_size_class,
)


def _hidden_fake(
    x: Tensor, w_in: Tensor, w_gate: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], w_in.shape[0])
    gate = x.new_empty(0 if w_gate is None else shape)
    return x.new_empty(shape), x.new_empty(shape), gate


_forward = define(
    "feed_forward(Tensor x, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in,"
    " Tensor? b_out, Tensor? b_gate, int kind) -> Tensor",
    lambda x, w_in, w_out, *rest: x.new_empty((*x.shape[:-1], w_out.shape[0])),
)
# -> hidden, up, gate
_hidden = define(
    "feed_forward_hidden(Tensor x, Tensor w_in, Tensor? w_gate, Tensor? b_in, Tensor? b_gate,"
    " int kind) -> (Tensor, Tensor, Tensor)",
    _hidden_fake,
)
_activation = define(
    "feed_forward_activation(Tensor up, Tensor? gate, int kind) -> Tensor",
    lambda up, gate, kind: torch.empty_like(up, memory_format=torch.contiguous_format),
)
# grad of hidden becomes that of up; -> hidden, gradient of gate
_backward = define(
    "feed_forward_backward(Tensor(a!) grad, Tensor up, Tensor? gate, int kind) -> (Tensor, Tensor)",
    lambda grad, up, gate, kind: (
        torch.empty_like(up, memory_format=torch.contiguous_format),
        up.new_empty(0 if gate is None else up.shape),
    ),
)
_FORWARD = by_backend("feed_forward", _forward)
_HIDDEN = by_backend("feed_forward", _hidden)
_BACKWARD = by_backend("feed_forward", _backward)


class _FeedForward(Function):
    """Keeps x and the projections; the activation is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        w_gate: Tensor | None,
        b_in: Tensor | None,
        b_out: Tensor | None,
        b_gate: Tensor | None,
        kind: str,
        backend: str,
    ) -> Tensor:
        gate: Tensor | None
        if backend != "torch":
            hidden, up, gate = _HIDDEN[backend](x, w_in, w_gate, b_in, b_gate, _NUMBER[kind])
            gate = None if w_gate is None else gate
            y = (own if backend == "cpu" else F.linear)(hidden, w_out, b_out)
        else:
            up = F.linear(x, w_in, b_in)
            gate = None if w_gate is None else F.linear(x, w_gate, b_gate)
            y = F.linear(_activation(up, gate, _NUMBER[kind]), w_out, b_out)
        ctx.save_for_backward(x, w_in, w_out, w_gate, b_in, b_out, b_gate, up, gate)
        ctx.kind, ctx.backend = kind, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, up, gate = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return *_differentiable(inputs, ctx.kind, grad, ctx.needs_input_grad), None, None
        x, w_in, w_out, w_gate, *_ = inputs
        need = ctx.needs_input_grad
        grad, x_rows = as_matrix(grad), as_matrix(x)
        up, gate = as_matrix(up), None if gate is None else as_matrix(gate)
        d_up = grad_x(grad, w_out)  # the gradient of hidden, until the kernel has passed
        pointwise = _BACKWARD[ctx.backend] if ctx.backend == "triton" else _backward
        hidden, d_gate = pointwise(d_up, up, gate, _NUMBER[ctx.kind])
        dx = d_w_gate = None
        if need[0]:
            dx = grad_x(d_up, w_in)
            if w_gate is not None and ctx.backend == "triton":
                dx = dx.addmm_(d_gate, w_gate)  # in one launch
            elif w_gate is not None:
                dx = dx.add_(grad_x(d_gate, w_gate))
            dx = dx.view(x.shape)
        if w_gate is not None and need[3]:
            d_w_gate = grad_w(d_gate, x_rows)
        return (
            dx,
            grad_w(d_up, x_rows) if need[1] else None,
            grad_w(grad, hidden) if need[2] else None,
            d_w_gate,
            d_up.sum(0) if need[4] else None,
            grad.sum(0) if need[5] else None,
            d_gate.sum(0) if need[6] else None,
            None,
            None,
        )


def _differentiable(
    inputs: list[Tensor | None], kind: str, grad: Tensor, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by PyTorch's own operators, so that they can be differentiated again."""

    def function(x: Tensor, w_in: Tensor, w_out: Tensor, *rest: Tensor | None) -> Tensor:
        w_gate, b_in, b_out, b_gate = rest
        biases = {"b_in": b_in, "b_out": b_out, "b_gate": b_gate}
        return reference.feed_forward(x, w_in, w_out, w_gate=w_gate, **biases, activation=kind)

    return again(function, inputs, need[: len(inputs)], grad)


# Rows at a time. Smaller blocks would keep the intermediates in cache, but the library packs the
# weights again for each: 256 at a time took up to 1.8 times as long as 2048 at once.
_BLOCK = 4096


def _by_library(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    kind: int,
) -> Tensor:
    """The library's products around our activation, in blocks that bound the memory."""

    rows = as_matrix(x)
    y = x.new_empty(len(rows), w_out.shape[0])
    for part, out in zip(rows.split(_BLOCK), y.split(_BLOCK), strict=True):
        up = F.linear(part, w_in, b_in)
        gate = None if w_gate is None else F.linear(part, w_gate, b_gate)
        hidden = _activation(up, gate, kind)
        if b_out is None:
            torch.mm(hidden, w_out.t(), out=out)
        else:
            torch.addmm(b_out, hidden, w_out.t(), out=out)
    return y.view(*x.shape[:-1], w_out.shape[0])


def feed_forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    w_gate: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """The whole feed-forward block.

    plain: y = act(x w_in^T + b_in) w_out^T + b_out
    gated: y = (act(x w_gate^T + b_gate) * (x w_in^T + b_in)) w_out^T + b_out

    Args:
        x: [..., D], any strides; fp32, bf16, fp16 or fp64.
        w_in: [H, D], of x's dtype like every other argument; a transposed view does not cost a copy
            for a few rows.
        w_out: [E, H].
        w_gate: [H, D] for the gated form, else None.
        b_in, b_gate: [H] or None. b_out: [E] or None.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2".

    Returns:
        y [..., E] in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown activation, b_gate
            without w_gate.
        TypeError: an argument that is no floating-point tensor.

    Products, sums and the activation are fp32, rounded to x's dtype where a result is stored. The
    backward pass keeps x and the input projections and recomputes the activation.
    Source: Shazeer, arXiv:2002.05202.

    >>> x, w = torch.ones(1, 2), torch.eye(2)
    >>> feed_forward(x, w, w, w_gate=-w, activation="relu")
    tensor([[0., 0.]])
    """
    try:
        if autocasts(x):
            x, w_in, w_out, w_gate, b_in, b_out, b_gate = autocast(
                x, w_in, w_out, w_gate, b_in, b_out, b_gate
            )
        transposed = not (w_in.is_contiguous() and w_out.is_contiguous())
        key = (x.is_cpu or x.device, x.dtype, size_of(x), transposed)
        args = x, w_in, w_out, w_gate, b_in, b_out, b_gate
        grad = needs_grad(*args)
        backend = _chosen.get(key)
        if backend is None:
            sizes = x.shape, w_in.shape, w_out.shape[0], w_gate is not None, grad
            facts = {"rows": key[2], "transposed": transposed}
            backend = settle("feed_forward", _chosen, key, x, sizes, **facts)
        if backend == "cpu" and not grad:
            # the binding checks the shapes, for calls of a few microseconds
            return _forward(*args, _NUMBER[activation])
    except Exception:
        _check(x, w_in, w_out, w_gate, b_in, b_out, b_gate, activation)  # names the one at fault
        raise
    _check(*args, activation)
    if backend == "reference":
        return reference.feed_forward(
            x,
            w_in,
            w_out,
            w_gate=w_gate,
            b_in=b_in,
            b_out=b_out,
            b_gate=b_gate,
            activation=activation,
        )
    if grad:
        return _FeedForward.apply(*args, activation, backend)
    if backend == "triton":
        return _FORWARD[backend](*args, _NUMBER[activation])
    return _by_library(*args, _NUMBER[activation])


_chosen = memory()


def _check(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    activation: str,
) -> None:
    if activation not in KINDS:
        raise _checks.fail("feed_forward", "activation", f"one of {', '.join(KINDS)}", activation)
    check_linear("feed_forward", x, w_in, b_in, ("w_in", "b_in"))
    hidden = w_in.shape[0]
    _checks.floating("feed_forward", "w_out", w_out)
    if w_out.dim() != 2 or w_out.shape[1] != hidden:
        raise _checks.fail("feed_forward", "w_out", f"[E, {hidden}]", list(w_out.shape))
    _checks.same_dtype("feed_forward", "w_out", w_out, x)
    _checks.same_device("feed_forward", "w_out", w_out, x)
    if b_out is not None:
        _checks.floating("feed_forward", "b_out", b_out)
        _checks.shape("feed_forward", "b_out", b_out, w_out.shape[:1])
        _checks.same_dtype("feed_forward", "b_out", b_out, x)
        _checks.same_device("feed_forward", "b_out", b_out, x)
    if w_gate is not None:
        check_linear("feed_forward", x, w_gate, b_gate, ("w_gate", "b_gate"))
        _checks.shape("feed_forward", "w_gate", w_gate, w_in.shape)
    elif b_gate is not None:
        raise _checks.fail("feed_forward", "b_gate", "None without w_gate", "a tensor")
