"""The feed-forward block of a decoder layer: two or three linear maps around an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register
from fastlm.ops.linear import autocast
from fastlm.ops.linear import check as check_linear

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

register("feed_forward")


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
        w_in: [H, D], of x's dtype like every other argument.
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
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        x, w_in, w_out, w_gate, b_in, b_out, b_gate = autocast(
            x, w_in, w_out, w_gate, b_in, b_out, b_gate
        )
    _check(x, w_in, w_out, w_gate, b_in, b_out, b_gate, activation)
    choose("feed_forward", x)
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
