"""Pointwise activations, plain and gated."""

from __future__ import annotations

from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

register("activation")


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
    choose("activation", x, kind=kind, gated=False)
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
    choose("activation", gate, kind=kind, gated=True)
    return reference.gated_activation(gate, up, kind)


def _check_kind(op: str, kind: str) -> None:
    if kind not in KINDS:
        raise _checks.fail(op, "kind", f"one of {', '.join(KINDS)}", repr(kind))
