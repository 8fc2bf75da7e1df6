"""Rotary position embedding of queries and keys in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _checks, _torch
from fastlm.ops._library import Function, by_backend, define, needs_grad
from fastlm.ops._measured import direction, power
from fastlm.ops._registry import (
    Backend,
    Unsupported,
    memory,
    native,
    plain,
    register,
    settle,
    triton,
)

_TYPES = native(torch.float32, torch.bfloat16, torch.float16)
_CUDA = native(torch.float32, torch.bfloat16)
_MAX_ROTARY = 8192


def _unsupported(
    dtype: torch.dtype,
    *,
    tables: torch.dtype,
    rotary: int,
    table_grad: bool,
    interleaved: bool = False,
    types: Unsupported = _TYPES,
) -> list[str]:
    reasons = types(dtype)
    if rotary > _MAX_ROTARY:
        reasons.append(f"rotates at most {_MAX_ROTARY} elements, not {rotary}")
    if table_grad:
        reasons.append("has no gradient for cos and sin")
    return reasons


def _torch_unsupported(
    dtype: torch.dtype, *, tables: torch.dtype, interleaved: bool = False, **facts: Any
) -> list[str]:
    reasons = [] if tables == dtype else [f"takes tables of {dtype}, not {tables}"]
    return reasons + ["is not written for neighbours"] * interleaved


def _size_class(q: torch.Size, kv_heads: int, grad: bool, interleaved: bool) -> str:
    tokens = power(q[0] * q[2])
    return f"{tokens} tokens x {q[1]}/{kv_heads} heads x {q[3]}{direction(grad)}"


register(
    "rope",
    Backend("cuda", ("cuda",), lambda dtype, **facts: _unsupported(dtype, **facts, types=_CUDA)),
    Backend("cpu", ("cpu",), _unsupported),
    triton(_unsupported),
    plain(_torch_unsupported),
    classes=_size_class,
)


def _empty_in_order(x: Tensor) -> Tensor:
    """A new [B, H, T, D]: tokens within heads or heads within tokens, as x lies in memory."""
    if x.stride(1) < x.stride(2):
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)
    return x.new_empty(x.shape)


def _rope_single_fake(
    x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool, transposed: bool
) -> Tensor:
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.same_device("rope", name, table, x)
    return _empty_in_order(x)


def _rope_fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary: int,
    interleaved: bool,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    _checks.same_device("rope", "k", k, q)
    return _rope_single_fake(q, cos, sin, rotary, interleaved, transposed), _empty_in_order(k)


_rope = define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, int rotary, bool interleaved,"
    " bool transposed) -> (Tensor, Tensor)",
    _rope_fake,
)
_rope_single = define(
    "rope_single(Tensor x, Tensor cos, Tensor sin, int rotary, bool interleaved, bool transposed)"
    " -> Tensor",
    _rope_single_fake,
)


def _in_place_single_fake(
    x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool
) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.same_device("rope_", name, table, x)


def _in_place_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool
) -> None:
    _checks.same_device("rope_", "k", k, q)
    _in_place_single_fake(q, cos, sin, rotary, interleaved)


_rope_in_place = define(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, int rotary, bool interleaved) -> ()",
    _in_place_fake,
)
_rope_single_in_place = define(
    "rope_single_(Tensor(a!) x, Tensor cos, Tensor sin, int rotary, bool interleaved) -> ()",
    _in_place_single_fake,
)

_ROPE = by_backend("rope", _rope)
_ROPE_SINGLE = by_backend("rope", _rope_single)
_ROPE_IN_PLACE = by_backend("rope", _rope_in_place)
_ROPE_SINGLE_IN_PLACE = by_backend("rope", _rope_single_in_place)


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        rotary: int,
        interleaved: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.form, ctx.backend = (rotary, interleaved), backend
        return _ROPE[backend](q, k, cos, sin, rotary, interleaved, False)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # the gradient of a linear map is its transpose
        dq, dk = _ROPE[ctx.backend](grad_q, grad_k, *ctx.saved_tensors, *ctx.form, True)
        return dq, dk, None, None, None, None, None


class _RopeSingle(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        rotary: int,
        interleaved: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.form, ctx.backend = (rotary, interleaved), backend
        return _ROPE_SINGLE[backend](x, cos, sin, rotary, interleaved, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = _ROPE_SINGLE[ctx.backend](grad, *ctx.saved_tensors, *ctx.form, True)
        return dx, None, None, None, None, None


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
    try:
        rotary = reference.rotated_width(q.shape[-1], cos.shape[-1], rotary_dim)
        grad = needs_grad(q, k, cos, sin)
        table_grad = grad and (cos.requires_grad or sin.requires_grad)
        key = (q.is_cpu or q.device, q.dtype, cos.dtype, rotary, table_grad)
        backend = _chosen.get(key) or _choose(key, q, k, interleaved, grad)
        if backend in _ROPE:  # the binding checks the arguments, for calls of a few microseconds
            if k is None:
                if grad:
                    return _RopeSingle.apply(q, cos, sin, rotary, interleaved, backend), None
                return _ROPE_SINGLE[backend](q, cos, sin, rotary, interleaved, False), None
            if grad:
                return _Rope.apply(q, k, cos, sin, rotary, interleaved, backend)
            return _ROPE[backend](q, k, cos, sin, rotary, interleaved, False)
    except Exception:
        _check(q, k, cos, sin, rotary_dim)  # names the argument at fault
        raise
    _check(q, k, cos, sin, rotary_dim)
    run = (_torch if backend == "torch" else reference).rope
    return run(q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary)


def rope_(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fastlm.ops.rope` in place: q and k are overwritten, nothing is allocated.

    The results are those of `rope`, bit for bit; only the first R elements of a head are written.
    Where the last dimension is not dense the rotation is made apart and copied.

    Args:
        q: [B, Hq, T, D], any strides without elements that share memory; as in `rope`.
        k: [B, Hkv, T, D] of q's dtype, apart from q, or None.
        cos: as in `rope`.
        sin: like cos.
        interleaved: as in `rope`.
        rotary_dim: as in `rope`.

    Returns:
        (q, k), the same tensors.

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit; nothing is written then.
        TypeError: an argument that is no floating-point tensor.
        RuntimeError: a gradient is wanted: what is written in place has none.

    Numerics and source are those of `rope`.

    >>> x, quarter_turn = torch.tensor([[[[1.0, 0.0]]]]), (torch.zeros(1, 1), torch.ones(1, 1))
    >>> rope_(x, None, *quarter_turn)[0] is x, x
    (True, tensor([[[[0., 1.]]]]))
    """
    try:
        if needs_grad(q, k, cos, sin):
            raise RuntimeError(
                "rope_: no argument may require a gradient, for q and k are overwritten;"
                " call it in torch.no_grad(), or fastlm.ops.rope"
            )
        rotary = reference.rotated_width(q.shape[-1], cos.shape[-1], rotary_dim)
        key = (q.is_cpu or q.device, q.dtype, cos.dtype, rotary, False)
        backend = _chosen.get(key) or _choose(key, q, k, interleaved, False)
        dense = q.stride(-1) == 1 and (k is None or k.stride(-1) == 1)
        if backend in _ROPE and dense:  # the binding checks the arguments
            if k is None:
                _ROPE_SINGLE_IN_PLACE[backend](q, cos, sin, rotary, interleaved)
            else:
                _ROPE_IN_PLACE[backend](q, k, cos, sin, rotary, interleaved)
            if torch.is_grad_enabled() and not is_dynamo_compiling():
                increment_version([x for x in (q, k) if x is not None and not x.is_inference()])
            return q, k
    except Exception:
        _check(q, k, cos, sin, rotary_dim, "rope_")  # names the argument at fault
        _check_own_elements(q, k)
        raise
    _check(q, k, cos, sin, rotary_dim, "rope_")
    _check_own_elements(q, k)
    y, z = rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary)
    return q.copy_(y), None if k is None or z is None else k.copy_(z)


_chosen = memory()


def _choose(
    key: tuple[Any, ...], q: Tensor, k: Tensor | None, interleaved: bool, grad: bool
) -> str:
    sizes = q.shape, 0 if k is None else k.shape[1], grad, interleaved
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    _, _, tables, rotary, table_grad = key
    facts = {"tables": tables, "rotary": rotary, "table_grad": table_grad}
    if interleaved:
        facts["interleaved"] = True
    return settle("rope", _chosen, key, q, sizes, **facts)


def _check(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int | None,
    op: str = "rope",
) -> None:
    """Checks one argument after another, to name the one that is wrong."""
    _checks.floating(op, "q", q)
    _checks.rank(op, "q", q, 4)
    batch, _, tokens, head = q.shape
    if k is not None:
        _checks.floating(op, "k", k)
        _checks.rank(op, "k", k, 4)
        _checks.shape(op, "k", k, (batch, k.shape[1], tokens, head))
        _checks.same_dtype(op, "k", k, q)
        _checks.same_device(op, "k", k, q)
    _checks.floating(op, "cos", cos)
    _checks.rank(op, "cos", cos, 2, 3)
    width = cos.shape[-1]
    leading = (
        (tokens,) if cos.dim() == 2 else (cos.shape[0] if cos.shape[0] == 1 else batch, tokens)
    )
    _checks.shape(op, "cos", cos, (*leading, width))
    if cos.dtype not in (q.dtype, torch.float32):
        raise _checks.fail(op, "cos", f"{q.dtype} or torch.float32", cos.dtype)
    _checks.same_device(op, "cos", cos, q)
    _checks.floating(op, "sin", sin)
    _checks.shape(op, "sin", sin, cos.shape)
    _checks.same_dtype(op, "sin", sin, cos)
    _checks.same_device(op, "sin", sin, q)
    check_width(op, head, width, rotary_dim)


def _check_own_elements(q: Tensor, k: Tensor | None) -> None:
    """Checks that q and k can be overwritten, each by itself."""
    for name, x in (("q", q), ("k", k)):
        if x is not None and any(
            n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True)
        ):
            layout = f"strides {list(x.stride())}"
            raise _checks.fail("rope_", name, "without elements that share memory", layout)
    if (
        k is not None
        and not is_dynamo_compiling()
        and q.numel()
        and 0 != q.data_ptr() == k.data_ptr()
    ):
        raise _checks.fail("rope_", "k", "apart from q", "the same memory")


def check_width(op: str, head: int, width: int, rotary_dim: int | None) -> None:
    """Checks that tables of a width turn all or some of the elements of a head."""
    rotary = reference.rotated_width(head, width, rotary_dim)
    if rotary_dim is not None and not (0 < rotary <= head and rotary % 2 == 0):
        raise _checks.fail(op, "rotary_dim", f"even and at most {head}", rotary_dim)
    if width not in (rotary, rotary // 2) or rotary > head or rotary % 2 or rotary == 0:
        expected = f"{rotary} or {rotary // 2}" if rotary_dim else f"even and at most {head}"
        raise _checks.fail(op, "cos", f"of a width {expected}", width)
