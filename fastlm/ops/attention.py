"""Scaled dot-product attention: causal, windowed, grouped heads, masks, packed sequences."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._attention_checks import WIDEST, check, check_options, check_packed
from fastlm.ops._library import (
    Function,
    again,
    autocasts,
    by_backend,
    define,
    direct,
    needs_grad,
    twice,
)
from fastlm.ops._measured import direction, power
from fastlm.ops._registry import Backend, memory, native, register, settle, triton

_NATIVE = native(torch.float32, torch.bfloat16, torch.float16)


def _cpu_unsupported(dtype: torch.dtype, *, form: str, options: tuple[str, ...]) -> list[str]:
    reasons = _NATIVE(dtype)
    for option in ("gradient of mask", "gradient of alibi_slopes"):
        if option in options:
            reasons.append(f"makes no {option}")
    if "gradient of sinks" in options and dtype != torch.float32:
        # its rows nearly cancel, and an output rounded to half precision has lost what is left
        reasons.append("makes the gradient of sinks in float32 only")
    if "fp64 mask" in options:
        reasons.append("takes a mask of bool, float32, bfloat16 or float16")
    return reasons


_MAX_HEAD = 256


def _triton_unsupported(dtype: torch.dtype, *, form: str, options: tuple[str, ...]) -> list[str]:
    reasons = _NATIVE(dtype)
    if "large head" in options:
        reasons.append(f"takes heads of at most {_MAX_HEAD} elements")
    return reasons


def _torch_unsupported(dtype: torch.dtype, *, form: str, options: tuple[str, ...]) -> list[str]:
    reasons = [f"has no {option}" for option in options if option in _OURS]
    if form == "packed":
        reasons.append("has no packed sequences")
    if "causal" in options and form != "square":
        reasons.append("with causal puts the first query, not the last, beside the key it sees")
    if "causal" in options and "mask" in options:
        reasons.append("takes causal or a mask, not both")
    return reasons


def _size_class(q: torch.Size, k: torch.Size, value: int, grad: bool) -> str:
    *batch, heads, rows, head = q if len(q) == 4 else (q[1], q[0], q[2])
    kv_heads, keys = k[-3:-1] if len(k) == 4 else (k[1], k[0])
    tokens = power(rows) if rows == keys else f"{power(rows)} of {power(keys)}"
    many = f"{power(batch[0])} x " if batch else "packed, "
    width = head if head == value else f"{head}/{value}"
    return f"{many}{heads}/{kv_heads} heads, {tokens} tokens x {width}{direction(grad)}"


_OURS = ("window", "softcap", "alibi_slopes", "sinks", "return_lse")
register(
    "attention",
    Backend("cpu", ("cpu",), _cpu_unsupported),
    Backend("torch", (), _torch_unsupported),
    triton(_triton_unsupported),
    classes=_size_class,
)

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor? sinks, Tensor? starts_q,"
    " Tensor? starts_k, bool causal, int window, float scale, float softcap"
)


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """A packed tensor, or [B, H, T, Dv] in the memory of a [B, T, H, Dv]."""
    if q.dim() == 3:
        return q.new_empty((*q.shape[:2], v.shape[-1]))
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[-1])).transpose(1, 2)


def _empty_lse(q: Tensor) -> Tensor:
    """[0] is the log-sum-exp, [1] what rounding it to fp32 took off, for the backward."""
    shape = (2, q.shape[1], q.shape[0]) if q.dim() == 3 else (2, *q.shape[:3])
    return q.new_empty(shape, dtype=torch.float32)


def _empty_gradient(x: Tensor) -> Tensor:
    """In the order of heads and rows in memory that x has."""
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        return _empty_out(x, x)
    return x.new_empty(x.shape)


def _gradients_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    with_mask, with_slopes = rest[-2:]
    asked = (mask if with_mask else None, slopes if with_slopes else None, sinks)
    more = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in asked)
    return *(_empty_gradient(x) for x in (q, k, v)), *more


_forward = define(f"attention({_ARGUMENTS}) -> Tensor", lambda q, k, v, *options: _empty_out(q, v))
_forward_direct = direct(_forward)
_forward_lse = define(
    f"attention_lse({_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda q, k, v, *options: (_empty_out(q, v), _empty_lse(q)),
)
_backward = define(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor? mask, Tensor? slopes, Tensor? starts_q, Tensor? starts_k, bool causal,"
    " int window, float scale, float softcap) -> (Tensor, Tensor, Tensor)",
    lambda grad, grad_lse, q, k, v, *rest: tuple(_empty_gradient(x) for x in (q, k, v)),
)


_sinks_backward = define(
    "attention_sinks_backward(Tensor grad, Tensor? grad_lse, Tensor out, Tensor lse, Tensor sinks,"
    " Tensor? starts_q) -> Tensor",
    lambda grad, grad_lse, out, lse, sinks, starts_q: torch.empty_like(sinks),
)

# -> gradients of q, k, v and, where asked for (the sinks where given), mask, slopes and sinks
_gradients = define(
    "attention_gradients(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor? mask, Tensor? slopes, Tensor? sinks, Tensor? starts_q, Tensor? starts_k,"
    " bool causal, int window, float scale, float softcap, bool deterministic, bool with_mask,"
    " bool with_slopes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients_fake,
)
_forward_of = by_backend("attention", _forward)
_forward_lse_of = by_backend("attention", _forward_lse)
_gradients_of = by_backend("attention", _gradients)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
        starts_q: Tensor | None,
        starts_k: Tensor | None,
        numbers: tuple[bool, int, float, float],
        return_lse: bool,
        backend: str,
        deterministic: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        forward = _forward_lse_of[backend]
        out, lse = forward(q, k, v, mask, slopes, sinks, starts_q, starts_k, *numbers)
        ctx.save_for_backward(q, k, v, out, lse, mask, slopes, sinks, starts_q, starts_k)
        ctx.numbers, ctx.backend, ctx.deterministic = numbers, backend, deterministic
        return (out, lse[0]) if return_lse else out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, grad_lse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, slopes, sinks, starts_q, starts_k = ctx.saved_tensors
        if twice():
            inputs = q, k, v, mask, slopes, sinks
            return *_again(ctx, inputs, (starts_q, starts_k), grad, grad_lse), *(None,) * 6
        if ctx.backend == "triton":
            need = ctx.needs_input_grad[3:6]
            tables = (out, lse, mask, slopes, sinks if need[2] else None, starts_q, starts_k)
            how = (*ctx.numbers, ctx.deterministic, *need[:2])
            *made, dmask, dslopes, dsinks = _gradients_of["triton"](
                grad, grad_lse, q, k, v, *tables, *how
            )
            more = zip(need, (dmask, dslopes, dsinks), strict=True)
            return *made, *(x if wanted else None for wanted, x in more), *(None,) * 6
        dq, dk, dv = _backward(
            grad, grad_lse, q, k, v, out, lse, mask, slopes, starts_q, starts_k, *ctx.numbers
        )
        dsinks = None
        if ctx.needs_input_grad[5]:
            dsinks = _sinks_backward(grad, grad_lse, out, lse, sinks, starts_q)
        return dq, dk, dv, None, None, dsinks, *(None,) * 6


def _again(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    starts: tuple[Tensor | None, ...],
    grad: Tensor,
    grad_lse: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of q, k, v, mask, slopes and sinks that have gradients themselves."""
    causal, window, scale, softcap = ctx.numbers
    starts_q, starts_k = starts

    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> Any:
        return reference.attention(
            q,
            k,
            v,
            causal=causal,
            scale=scale,
            window=window or None,
            softcap=softcap or None,
            alibi_slopes=slopes,
            sinks=sinks,
            mask=mask,
            cu_seqlens_q=starts_q,
            cu_seqlens_k=starts_k,
            return_lse=True,
        )

    return again(function, inputs, ctx.needs_input_grad[:6], grad, grad_lse)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    mask: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    mask: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[True],
    deterministic: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = sum_j softmax_j(s_ij) v_j with s_ij = scale q_i . k_j over the keys i sees.

    Query i stands at position p_i = i + Tk - Tq: the last query beside the last key.

    Args:
        q: [B, Hq, Tq, D]; fp32, bf16, fp16 or fp64; any strides.
        k: [B, Hkv, Tk, D], like q; Hkv divides Hq and head h of q uses head h // (Hq / Hkv).
        v: [B, Hkv, Tk, Dv], like q.
        causal: key j is seen when j <= p_i.
        scale: of the scores; 1 / sqrt(D) when None.
        window: W >= 1; key j is seen when p_i - W < j < p_i + W (with `causal` only the left).
        softcap: c > 0; scores become c tanh(s / c), before the terms below.
        alibi_slopes: [Hq] or [B, Hq]; slope |p_i - j| is taken off the score.
        sinks: [Hq]; one more score per head, in the denominator of the softmax only.
        mask: broadcastable to [B, Hq, Tq, Tk]; bool (True: seen) or floating (added). Blocks of
            64 keys that it hides from 64 queries cost nothing.
        cu_seqlens_q: [N + 1] int32, from 0 to total: N sequences packed one after the other into
            q [total, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv], none seeing another.
        cu_seqlens_k: the same for k and v; cu_seqlens_q when None.
        return_lse: also returns log sum_j exp(s_ij), the sink included.
        deterministic: False allows a backward whose sums have no fixed order, where one is offered
            (Triton's: fewer products), unless torch.use_deterministic_algorithms asks for order;
            every other kernel of ours gives the same bits every time.

    Returns:
        out [B, Hq, Tq, Dv] of q's dtype, a view of a [B, Tq, Hq, Dv] tensor where a kernel made it
        (packed: [total, Hq, Dv]); with return_lse the pair (out, lse), lse [B, Hq, Tq] (packed:
        [Hq, total]) in fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape, dtype, device or option that does not fit.
        TypeError: an argument that is no tensor of the kind asked for.

    A query that sees no key gives zeros and lse = -inf (with a sink: the sink), never NaN. Scores,
    softmax and sums are fp32; for bf16 the weights are rounded to bf16 before they meet v, fp16 is
    widened to fp32. The same input gives the same bits for any number of threads. Differentiable
    in q, k, v, alibi_slopes, sinks and a floating mask, a second time by PyTorch's own operators.
    Source: Dao, arXiv:2307.08691, algorithms 1 and 2; sinks: Xiao et al., arXiv:2309.17453.

    >>> q = torch.ones(1, 1, 2, 4)
    >>> attention(q, q, torch.eye(2)[None, None], causal=True)[0, 0]
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    if window is softcap is alibi_slopes is sinks is mask is cu_seqlens_q is cu_seqlens_k is None:
        try:
            out = _plain(q, k, v, causal, scale, return_lse)
        except (ArithmeticError, AttributeError, IndexError, RuntimeError):
            check(q, k, v)  # the kernel refused: say which argument
            raise
        if out is not None:
            return out
    if cu_seqlens_q is None:
        check(q, k, v)
        form = "square" if q.shape[2] == k.shape[2] else "oblong"
        if cu_seqlens_k is not None:
            raise _checks.fail("attention", "cu_seqlens_k", "given with cu_seqlens_q", "alone")
    else:
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, mask)
        form = "packed"
    options: tuple[str, ...] = ("causal",) if causal else ()
    if return_lse:
        options += ("return_lse",)
    if not (window is softcap is alibi_slopes is sinks is mask is None):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        check_options(q, k, batch, window, softcap, alibi_slopes, sinks, mask)
        options += _given(window, softcap, alibi_slopes, sinks, mask)
        window = None if window is None else min(window, WIDEST)
    if autocasts(q) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    if max(q.shape[-1], v.shape[-1]) > _MAX_HEAD:
        options += ("large head",)

    key = (q.is_cpu or q.device, q.dtype, form, options)
    backend = _chosen.get(key) or _choose(key, q, k, v, mask, sinks, form, options)
    if backend in ("cpu", "triton"):
        numbers = (causal, window or 0, scale, softcap or 0.0)
        slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        wide = None if sinks is None else sinks.float().contiguous()
        tables = (mask, slopes, wide, cu_seqlens_q, cu_seqlens_k)
        if needs_grad(q, k, v, mask, alibi_slopes, sinks):
            fixed = deterministic is not False or torch.are_deterministic_algorithms_enabled()
            how = (backend, fixed)
            return _Attention.apply(q, k, v, *tables, numbers, return_lse, *how)
        if not return_lse:
            return _forward_of[backend](q, k, v, *tables, *numbers)
        out, lse = _forward_lse_of[backend](q, k, v, *tables, *numbers)
        return out, lse[0]
    if backend == "torch":
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        if mask is not None and mask.dim() < 2:  # which it does not broadcast by itself
            mask = mask.expand(q.shape[2], k.shape[2])
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return reference.attention(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        mask=mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        return_lse=return_lse,
    )


_NONE = (None,) * 5  # no mask, slopes, sinks or packed sequences
_chosen = memory()


def _plain(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, return_lse: bool
) -> Tensor | None:
    """A call without options on the CPU kernel, which checks the shapes; None: not for it.

    Calls of a few microseconds come through here, as one token's do.
    """
    if return_lse or not q.is_cpu or is_autocast_enabled("cpu"):
        return None
    shape = q.shape  # made anew each time
    square = shape[2] == k.shape[2]
    key = (q.dtype, causal, square)
    backend = _chosen.get(key)
    if backend is None:
        form, options = "square" if square else "oblong", ("causal",) if causal else ()
        backend = _choose(key, q, k, v, None, None, form, options)
    if backend != "cpu":
        return None
    numbers = (causal, 0, shape[3] ** -0.5 if scale is None else scale, 0.0)
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, *_NONE, numbers, False, "cpu", True)
    return (_forward if is_dynamo_compiling() else _forward_direct)(q, k, v, *_NONE, *numbers)


def _choose(
    key: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    form: str,
    options: tuple[str, ...],
) -> str:
    sizes = q.shape, k.shape, v.shape[-1], is_grad_enabled() and needs_grad(q, k, v, mask, sinks)
    if not is_dynamo_compiling() and (known := _chosen.get((key, sizes))):
        return known
    return settle("attention", _chosen, key, q, sizes, form=form, options=options)


def _given(
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
) -> tuple[str, ...]:
    """The options of a call by name, for the chooser."""
    names = []
    if window is not None:
        names.append("window")
    if softcap is not None:
        names.append("softcap")
    if alibi_slopes is not None:
        names.append("alibi_slopes")
        if needs_grad(alibi_slopes):
            names.append("gradient of alibi_slopes")
    if sinks is not None:
        names.append("sinks")
        if needs_grad(sinks):
            names.append("gradient of sinks")
    if mask is not None:
        names.append("mask")
        if mask.dtype == torch.float64:
            names.append("fp64 mask")
        if needs_grad(mask):
            names.append("gradient of mask")
    return tuple(names)
