"""The matrix product with weights held in 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _checks, _torch
from fastlm.ops._library import Function, autocasts, by_backend, define, direct, needs_grad
from fastlm.ops._measured import direction, power
from fastlm.ops._registry import (
    Backend,
    Reasons,
    memory,
    native,
    plain,
    register,
    settle,
    triton,
)
from fastlm.ops.linear import as_matrix, autocast
from fastlm.reference import QuantizedWeight

_native = native(torch.float32, torch.bfloat16, torch.float16)


_FEW_ROWS = 16  # that the CUDA kernel takes


def _unsupported(
    dtype: torch.dtype, *, packed: bool, group_size: int, int8: bool, few: bool
) -> Reasons:
    reasons = _native(dtype)
    if not packed:
        whole = group_size % 32 == 0
        reasons.append(
            "the weight is not packed: see QuantizedWeight.pack"
            if whole
            else f"takes groups of a multiple of 32, not of {group_size}"
        )
    return reasons


def _triton_unsupported(
    dtype: torch.dtype, *, packed: bool, group_size: int, int8: bool, few: bool
) -> Reasons:
    reasons = _native(dtype)
    if packed:
        reasons.append("the weight is packed for the CPU: see QuantizedWeight.unpack")
    if group_size < 32 or group_size & (group_size - 1):
        reasons.append(f"takes groups of a power of two from 32 on, not of {group_size}")
    if int8:
        reasons.append("does not round activations to int8")
    return reasons


def _cuda_unsupported(dtype: torch.dtype, *, few: bool, **facts: Any) -> Reasons:
    reasons = _triton_unsupported(dtype, few=few, **facts)  # the same layout, the same groups
    return reasons if few else [*reasons, f"takes at most {_FEW_ROWS} rows"]


def _torch_unsupported(dtype: torch.dtype, *, int8: bool, **facts: Any) -> Reasons:
    return ["does not round activations to int8"] if int8 else []


def _size_class(x: torch.Size, outputs: int, bits: int, grad: bool) -> str:
    return f"int{bits} {power(x[:-1].numel())} x {x[-1]} x {outputs}{direction(grad)}"


register(
    "quantized_linear",
    Backend("cuda", ("cuda",), _cuda_unsupported),
    Backend("cpu", ("cpu",), _unsupported),
    triton(_triton_unsupported),
    plain(_torch_unsupported),
    classes=_size_class,
)


def _fake(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    int8: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


_own = define(
    "quantized_linear(Tensor x, Tensor values, Tensor scale, Tensor? minimum, Tensor? bias,"
    " int outputs, bool int8) -> Tensor",
    _fake,
)
_own_of = by_backend("quantized_linear", _own)
_direct_of = {name: direct(operator) for name, operator in _own_of.items()}


def _fake_dequantize(
    values: Tensor, scale: Tensor, minimum: Tensor | None, outputs: int, dtype: torch.dtype
) -> Tensor:
    width = values.shape[1] * (4 if values.dtype == torch.int8 else 8)
    return values.new_empty((outputs, width), dtype=dtype)


_dequantize = define(
    "dequantize(Tensor values, Tensor scale, Tensor? minimum, int outputs, ScalarType dtype)"
    " -> Tensor",
    _fake_dequantize,
)


class _QuantizedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None, int8: bool, backend: str
    ) -> Tensor:
        ctx.qweight, ctx.like = qweight, (x.dtype, x.shape)
        values, scale, minimum, *_ = qweight
        return _own_of[backend](x, values, scale, minimum, bias, qweight.shape[0], int8)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dtype, shape = ctx.like
        rows = as_matrix(grad).float()
        values, scale, minimum, _, _, outputs = ctx.qweight
        if outputs is None:
            w = ctx.qweight.dequantize()
        else:
            w = _dequantize(values, scale, minimum, outputs, torch.float32)
        dx = rows.mm(w).to(dtype).view(shape) if ctx.needs_input_grad[0] else None
        return dx, None, rows.sum(0).to(dtype) if ctx.needs_input_grad[2] else None, None, None


def quantize_weight(
    w: Tensor, bits: int = 8, group_size: int = 32, *, symmetric: bool = True
) -> QuantizedWeight:
    """Rounds a weight to integers with one scale per run of `group_size` values of a row.

    8 bits: w ~ q * scale, q in -127 ... 127. 4 bits: w ~ (q - 8) * scale, q in 0 ... 15; with
    symmetric=False w ~ q * scale + minimum. Scales and minima are fp16. In groups of 32 the result
    is bit for bit that of GGUF's Q8_0, Q4_0 and Q4_1 (its reference implementation).

    Args:
        w: [N, K], fp32, bf16, fp16 or fp64.
        bits: 8 or 4.
        group_size: divides K; even for 4 bits.
        symmetric: False stores a minimum too (4 bits only).

    Returns:
        A QuantizedWeight; its `dequantize(dtype)` gives [N, K] back. It carries no gradient. On
        the CPU it is packed for the kernel where group_size is a multiple of 32.

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
    return qweight.pack() if w.is_cpu else qweight


def quantized_linear(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activations: str = "exact",
) -> Tensor:
    """y = x w^T + bias with the weight w that `qweight` stands for.

    Args:
        x: [..., K], any strides; fp32, bf16, fp16 or fp64.
        qweight: what `quantize_weight` made of a weight [N, K].
        bias: [N], of x's dtype; None for zeros.
        activations: "exact", or "int8" to round x to 127 steps of the largest of 32 neighbours
            before the product, as llama.cpp does: K must be a multiple of 32.

    Returns:
        y [..., N] in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or activations that do not fit.
        TypeError: an argument of a wrong type.

    "exact": products and sums within fp32's rounding, one rounding to x's dtype. The CPU's kernel
    holds x in fixed point: to 2^-27 of the largest of 32 neighbours in fp32, 2^-20 in bf16 and
    fp16; a row of x that is not finite gives NaN. For more than 24 rows of bf16 it rounds the
    weight to bf16, as F.linear would take it.
    "int8": for normal x, y is off by 0.55 % (root mean square).
    Same bits for any number of threads. Differentiable in x and bias; the gradient is that of the
    exact product.
    """
    op = "quantized_linear"
    try:
        if autocasts(x):
            x, bias = autocast(x, bias)
        int8 = _MODES[activations]
        values, scale, minimum, _, group_size, outputs = qweight
        place = x.is_cpu or (x.device, x.numel() <= _FEW_ROWS * x.shape[-1])
        key = (place, x.dtype, outputs is not None, group_size, int8)
        backend = _chosen.get(key) or _choose(key, x, qweight, bias)
        if outputs is None and backend in _own_of:  # a weight by rows
            _check(op, x, qweight, bias, activations)
            outputs = qweight.shape[0]
        if backend in _own_of:  # the CPU's binding checks the shapes itself
            if is_grad_enabled() and needs_grad(x, bias):
                return _QuantizedLinear.apply(x, qweight, bias, int8, backend)
            own = (_own_of if is_dynamo_compiling() else _direct_of)[backend]
            return own(x, values, scale, minimum, bias, outputs, int8)
    except Exception:
        _check(op, x, qweight, bias, activations)  # names the argument at fault
        raise
    _check(op, x, qweight, bias, activations)
    run = (_torch if backend == "torch" else reference).quantized_linear
    return run(x, qweight, bias, activations)


_MODES = {"exact": False, "int8": True}
_chosen = memory()


def _choose(key: tuple[Any, ...], x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> str:
    sizes = x.shape, qweight.shape[0], qweight.bits, is_grad_enabled() and needs_grad(x, bias)
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    few = key[0] is True or key[0][1]
    facts = {"packed": key[2], "group_size": key[3], "int8": key[4], "few": few}
    return settle("quantized_linear", _chosen, key, x, sizes, **facts)


def _check(op: str, x: object, qweight: object, bias: object, activations: object) -> None:
    if not isinstance(qweight, QuantizedWeight):
        got = type(qweight).__name__
        raise TypeError(f"{op}: qweight must be a QuantizedWeight (see quantize_weight), got {got}")
    x = _checks.floating(op, "x", x)
    rows, cols = qweight.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise _checks.fail(op, "x", f"[..., {cols}]", list(x.shape))
    _checks.same_device(op, "qweight", qweight.values, x)
    if bias is not None:
        bias = _checks.floating(op, "bias", bias)
        _checks.shape(op, "bias", bias, (rows,))
        _checks.same_dtype(op, "bias", bias, x)
        _checks.same_device(op, "bias", bias, x)
    if activations not in _MODES:
        raise _checks.fail(op, "activations", "'exact' or 'int8'", repr(activations))
    if activations == "int8" and cols % 32:
        raise _checks.fail(op, "activations", f"'exact' for K = {cols}", "'int8'")
