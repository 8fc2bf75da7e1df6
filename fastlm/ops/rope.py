"""Rotary position embedding of queries and keys in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register

register("rope")


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y1, y2) = (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) for each pair of the first R elements.

    The pairs are (x[i], x[i + R/2]), or (x[2i], x[2i + 1]) when interleaved; elements from R on are
    copied. Tables of width R hold an angle for each element (cos1 and cos2 may differ), tables of
    width R/2 one for each pair.

    Args:
        q: [B, Hq, T, D], any strides; fp32, bf16, fp16 or fp64.
        k: [B, Hkv, T, D] of q's dtype, or None.
        cos: [T, w], [1, T, w] or [B, T, w], of q's dtype or fp32; one row per token.
        sin: like cos.
        interleaved: pairs of neighbours instead of the two halves.
        rotary_dim: R, with w = R or w = R/2. By default R = D where w = D or w = D/2, else R = w.

    Returns:
        (q, k) rotated, in the memory order of the inputs; None for a k of None.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        TypeError: an argument that is no floating-point tensor.

    Computed in fp32 with one rounding to q's dtype; the same input gives the same bits for any
    number of threads. Differentiable in q, k and the tables.
    Source: Su et al., arXiv:2104.09864, equation 34.

    >>> quarter_turn = torch.zeros(1, 1), torch.ones(1, 1)
    >>> rope(torch.tensor([[[[1.0, 0.0]]]]), None, *quarter_turn)[0]
    tensor([[[[0., 1.]]]])
    """
    rotary = _check(q, k, cos, sin, rotary_dim)
    choose("rope", q)
    return reference.rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary)


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> int:
    """Checks the arguments; returns R."""
    _checks.floating("rope", "q", q)
    _checks.rank("rope", "q", q, 4)
    batch, _, tokens, head = q.shape
    if k is not None:
        _checks.floating("rope", "k", k)
        _checks.rank("rope", "k", k, 4)
        _checks.shape("rope", "k", k, (batch, k.shape[1], tokens, head))
        _checks.same_dtype("rope", "k", k, q)
        _checks.same_device("rope", "k", k, q)
    _checks.floating("rope", "cos", cos)
    _checks.rank("rope", "cos", cos, 2, 3)
    width = cos.shape[-1]
    leading = (
        (tokens,) if cos.dim() == 2 else (cos.shape[0] if cos.shape[0] == 1 else batch, tokens)
    )
    _checks.shape("rope", "cos", cos, (*leading, width))
    if cos.dtype not in (q.dtype, torch.float32):
        raise _checks.fail("rope", "cos", f"{q.dtype} or torch.float32", cos.dtype)
    _checks.same_device("rope", "cos", cos, q)
    _checks.floating("rope", "sin", sin)
    _checks.shape("rope", "sin", sin, cos.shape)
    _checks.same_dtype("rope", "sin", sin, cos)
    _checks.same_device("rope", "sin", sin, q)
    rotary = reference.rotated_width(head, width, rotary_dim)
    if rotary_dim is not None and not (0 < rotary <= head and rotary % 2 == 0):
        raise _checks.fail("rope", "rotary_dim", f"even and at most {head}", rotary_dim)
    if width not in (rotary, rotary // 2) or rotary > head or rotary % 2 or rotary == 0:
        expected = (
            f"of width {rotary} or {rotary // 2}" if rotary_dim else f"even and <= {head} wide"
        )
        raise _checks.fail("rope", "cos", expected, f"width {width}")
    return rotary
