"""The matrix product with weights held in 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._registry import choose, register
from fastlm.ops.linear import autocast
from fastlm.reference import QuantizedWeight

register("quantized_linear")


def quantize_weight(
    w: Tensor, bits: int = 8, group_size: int = 32, *, symmetric: bool = True
) -> QuantizedWeight:
    """Rounds a weight to integers with one scale per run of `group_size` values of a row.

    8 bits: w ~ q * scale, q in -127 ... 127. 4 bits: w ~ (q - 8) * scale, q in 0 ... 15; with
    symmetric=False w ~ q * scale + minimum. Scales and minima are fp16, as in GGUF's Q8_0, Q4_0
    and Q4_1, whose rounding this is.

    Args:
        w: [N, K], fp32, bf16, fp16 or fp64.
        bits: 8 or 4.
        group_size: divides K; even for 4 bits.
        symmetric: False stores a minimum too (4 bits only).

    Returns:
        A QuantizedWeight; its `dequantize(dtype)` gives [N, K] back. It carries no gradient.

    Raises:
        ValueError: bits, group_size or symmetric that do not fit, a w that is no matrix or holds
            a group too large for an fp16 scale.
        TypeError: a w that is no floating-point tensor.

    >>> quantize_weight(torch.tensor([[-127.0, 64.0]]), group_size=2).values
    tensor([[-127,   64]], dtype=torch.int8)
    """
    op = "quantize_weight"
    _checks.floating(op, "w", w)
    _checks.rank(op, "w", w, 2)
    if bits not in (4, 8):
        raise _checks.fail(op, "bits", "8 or 4", bits)
    if not isinstance(group_size, int) or group_size < 1 or w.shape[1] % group_size:
        raise _checks.fail(op, "group_size", f"a divisor of {w.shape[1]}", group_size)
    if bits == 4 and group_size % 2:
        raise _checks.fail(op, "group_size", "even for 4 bits", group_size)
    if bits == 8 and not symmetric:
        raise _checks.fail(op, "symmetric", "True for 8 bits", symmetric)
    qweight = reference.quantize_weight(w, bits, group_size, symmetric)
    if not torch.isfinite(qweight.scale).all():
        raise _checks.fail(op, "w", "finite and within the range of an fp16 scale", "values beyond")
    return qweight


def quantized_linear(x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x w^T + bias with the weight w that `qweight` stands for.

    Args:
        x: [..., K], any strides; fp32, bf16, fp16 or fp64.
        qweight: what `quantize_weight` made of a weight [N, K].
        bias: [N], of x's dtype; None for zeros.

    Returns:
        y [..., N] in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        TypeError: an argument of a wrong type.

    Products and sums are fp32 with one rounding to x's dtype. Differentiable in x and bias.
    """
    op = "quantized_linear"
    if not isinstance(qweight, QuantizedWeight):
        got = type(qweight).__name__
        raise TypeError(f"{op}: qweight must be a QuantizedWeight (see quantize_weight), got {got}")
    _checks.floating(op, "x", x)
    if torch.is_autocast_enabled(x.device.type):
        x, bias = autocast(x, bias)
    rows, cols = qweight.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise _checks.fail(op, "x", f"[..., {cols}]", list(x.shape))
    _checks.same_device(op, "qweight", qweight.values, x)
    if bias is not None:
        _checks.floating(op, "bias", bias)
        _checks.shape(op, "bias", bias, (rows,))
        _checks.same_dtype(op, "bias", bias, x)
        _checks.same_device(op, "bias", bias, x)
    choose("quantized_linear", x)
    return reference.quantized_linear(x, qweight, bias)
