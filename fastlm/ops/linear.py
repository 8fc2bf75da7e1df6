"""The matrix product of rows with [out, in] weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register

register("linear")


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x w^T + bias.

    Args:
        x: [..., K], any strides; fp32, bf16, fp16 or fp64.
        w: [N, K], of x's dtype.
        bias: [N], of x's dtype; None for zeros.

    Returns:
        y [..., N] in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        TypeError: an argument that is no floating-point tensor.

    Products and sums are fp32 with one rounding to x's dtype. Differentiable in x, w and bias.
    Under autocast the arguments are cast to its dtype.

    >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        x, w, bias = autocast(x, w, bias)
    check("linear", x, w, bias)
    choose("linear", x)
    return reference.linear(x, w, bias)


def autocast(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors in autocast's dtype where it is on for the first one's device, else as given."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return list(tensors)  # type: ignore[arg-type]
    dtype = torch.get_autocast_dtype(device)
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
