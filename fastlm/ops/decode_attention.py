"""Attention of a few new queries against a long cache of keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _checks, _torch
from fastlm.ops._attention_checks import WIDEST
from fastlm.ops._library import autocasts, by_backend, define, direct, needs_grad
from fastlm.ops._measured import power
from fastlm.ops._registry import Backend, memory, native, plain, register, settle, triton
from fastlm.ops.linear import autocast

_NATIVE = native(torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD = 256


def _unsupported(dtype: torch.dtype, *, head: int, grad: bool, plain: bool = True) -> list[str]:
    reasons = _NATIVE(dtype)
    if head > _MAX_HEAD:
        reasons.append(f"takes heads of at most {_MAX_HEAD} elements, not {head}")
    if grad:
        reasons.append("has no gradient")
    return reasons


def _torch_unsupported(
    dtype: torch.dtype, *, head: int, grad: bool, plain: bool = True
) -> list[str]:
    return [] if plain else ["takes one query, one length for all and no other options"]


def _size_class(q: torch.Size, kv_heads: int, keys: int, *rest: Any) -> str:
    batch, heads, queries, size = q
    new = "" if queries == 1 else f"{queries} queries, "
    return f"{power(batch)} x {heads}/{kv_heads} heads, {new}{power(keys)} keys x {size}"


register(
    "decode_attention",
    Backend("cuda", ("cuda",), _unsupported),  # before Triton's until a GPU has measured both
    Backend("cpu", ("cpu",), _unsupported),
    triton(_unsupported),
    plain(_torch_unsupported),
    classes=_size_class,
)


def _decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    length: int,
    scale: float,
    window: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *rest: object,
) -> Tensor:
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.same_device("decode_attention", name, x, q)
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v_cache.shape[3])).transpose(1, 2)


_decode = define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, SymInt length,"
    " float scale, int window, Tensor? alibi_slopes, Tensor? sinks, float softcap,"
    " Tensor? block_table, Tensor? mask, Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _decode_fake,
)
_decode_of = by_backend("decode_attention", _decode)
_direct_of = {name: direct(operator) for name, operator in _decode_of.items()}


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """out[b,h,i] = sum_j p_j v[b,g,j], p = softmax_j(scale q[b,h,i] . k[b,g,j]), g = h Hkv / Hq.

    Sequence b has lengths[b] keys, the new tokens' own included. Query i stands at position
    p_i = lengths[b] - Tq + i and sees the keys 0 <= j <= p_i, with a window those with
    j > p_i - window. A query that sees no key gives zeros.

    Args:
        q: [B, Hq, Tq, D], any strides; fp32, bf16, fp16 or fp64.
        k_cache: [B, Hkv, S, D] of q's dtype, any strides, Hq a multiple of Hkv; or pages
            [blocks, Hkv, block_size, D]. Rows beyond a sequence's length are never used. int8
            where k_scale and v_scale are given.
        v_cache: like k_cache, last dimension Dv.
        lengths: int32 or int64 [B], or one int for all; 0 <= lengths <= S.
        block_table: int32 or int64 [B, n]: the pages of each sequence in order; entries beyond
            its length are not looked at. Then S = n * block_size.
        scale: 1 / sqrt(D) by default.
        window: at least 1; None for all keys.
        softcap: scores become softcap * tanh(scores / softcap).
        alibi_slopes: [Hq] or [B, Hq]; slope * (j - p_i) is added to the scores.
        sinks: [Hq], the logit of one more key whose value is zero.
        mask: broadcastable to [B, Hq, Tq, S]; bool (True: seen) or floating (added), besides what
            lengths and window say.
        k_scale: of an int8 cache: fp32 or fp16 [B, Hkv, S] (pages: [blocks, Hkv, block_size]);
            a key is its int8 elements times its scale. Given with v_scale.
        v_scale: the same for the values.

    Returns:
        [B, Hq, Tq, Dv] of q's dtype, a view of a [B, Tq, Hq, Dv] tensor where a kernel made it.

    Raises:
        ValueError: a shape, dtype, device or length that does not fit.
        TypeError: an argument of the wrong kind.

    Scores and sums are fp32; for bf16 the weights are rounded to bf16 before they meet v, fp16 and
    int8 elements are widened to fp32. Pages give the bits of a contiguous cache. The same input
    gives the same bits for any number of threads, and a sequence the same bits alone as in a batch.
    Differentiable through the reference.
    Source: Dao et al., "Flash-Decoding for long-context inference", 2023; arXiv:2205.14135.

    >>> q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 8, 4)
    >>> decode_attention(q, k, torch.ones(1, 1, 8, 4), 5)[0, 0]
    tensor([[1., 1., 1., 1.]])
    """
    cache = q, k_cache, v_cache, lengths, block_table
    given = *cache, window, softcap, alibi_slopes, sinks, mask, k_scale, v_scale
    try:
        if autocasts(q):
            q, k_cache, v_cache = autocast(q, k_cache, v_cache)
        size = q.shape[-1]
        grad = needs_grad(q, k_cache, v_cache, alibi_slopes, sinks, mask, k_scale, v_scale)
        head = max(size, v_cache.shape[-1])
        key = (q.is_cpu or q.device, q.dtype, head, grad)
        backend = _chosen.get(key)
        if backend is None:
            simple = block_table is window is softcap is alibi_slopes is sinks is None
            simple = simple and mask is k_scale is v_scale is None
            backend = _choose(key, q, k_cache, lengths, simple)
        if scale is None:
            scale = size**-0.5
        if backend != "cpu":
            _check(*given)  # the CPU's binding does it itself, for calls of a few microseconds
        if backend == "torch":
            return _torch.decode_attention(q, k_cache, v_cache, lengths, scale=scale)  # type: ignore[arg-type]
        if backend != "reference":
            many, one = (lengths, 0) if isinstance(lengths, Tensor) else (None, lengths)
            slopes = None if alibi_slopes is None else _wide("alibi_slopes", alibi_slopes)
            logits = None if sinks is None else _wide("sinks", sinks)
            nearest = 0 if window is None else min(window, WIDEST) or -1
            cap = 0.0 if softcap is None else softcap if 0 < softcap < math.inf else math.nan
            if mask is not None and mask.is_floating_point():
                mask = mask.float()
            more = (slopes, logits, cap, block_table, mask, k_scale, v_scale)
            run = (_decode_of if is_dynamo_compiling() else _direct_of)[backend]
            return run(q, k_cache, v_cache, many, one, scale, nearest, *more)
    except Exception:
        _check(*given)  # names the argument at fault
        raise
    return reference.decode_attention(
        q,
        k_cache,
        v_cache,
        lengths,
        block_table=block_table,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        mask=mask,
        k_scale=k_scale,
        v_scale=v_scale,
    )


_chosen = memory()


def _wide(name: str, x: Tensor) -> Tensor:
    return _checks.floating("decode_attention", name, x).float()


def _choose(
    key: tuple[Any, ...], q: Tensor, k_cache: Tensor, lengths: Tensor | int, simple: bool
) -> str:
    plain = simple and q.shape[2] == 1 and isinstance(lengths, int) and lengths > 0
    keys = lengths if isinstance(lengths, int) else k_cache.shape[2]
    sizes = q.shape, k_cache.shape[1], keys, plain
    if not is_dynamo_compiling():
        top = 1 << max(keys - 1, 0).bit_length()  # of the class: a cache grows with every token
        sizes = q.shape, k_cache.shape[1], top, plain
        if known := _chosen.get((key, sizes)):
            return known
    facts = {"head": key[2], "grad": key[3]} | ({} if plain else {"plain": False})
    return settle("decode_attention", _chosen, key, q, sizes, **facts)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    block_table: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    op = "decode_attention"
    _checks.floating(op, "q", q)
    _checks.rank(op, "q", q, 4)
    for name, x, scales in (("k_cache", k_cache, k_scale), ("v_cache", v_cache, v_scale)):
        _checks.tensor(op, name, x)
        if k_scale is None and v_scale is None:
            _checks.floating(op, name, x)
            _checks.same_dtype(op, name, x, q)
        elif x.dtype != torch.int8:
            raise _checks.fail(op, name, "torch.int8 with scales", x.dtype)
        else:
            _check_scales(f"{name[0]}_scale", scales, x)
        _checks.rank(op, name, x, 4)
        _checks.same_device(op, name, x, q)
    batch, heads, _, size = q.shape
    kv_heads, keys = k_cache.shape[1:3]
    rows = batch if block_table is None else k_cache.shape[0]
    if size == 0:
        raise _checks.fail(op, "q", "of a head size of 1 or more", list(q.shape))
    _checks.shape(op, "k_cache", k_cache, (rows, kv_heads, keys, size))
    _checks.shape(op, "v_cache", v_cache, (rows, kv_heads, keys, v_cache.shape[3]))
    if kv_heads == 0 or heads % kv_heads:
        raise _checks.fail(
            op, "k_cache", f"of a head count that divides {heads}", f"{kv_heads} heads"
        )
    if block_table is not None:
        _integers(op, "block_table", block_table, q)
        _checks.rank(op, "block_table", block_table, 2)
        _checks.shape(op, "block_table", block_table, (batch, block_table.shape[1]))
        keys *= block_table.shape[1]
        known = block_table.is_cpu and not torch.compiler.is_compiling() and block_table.numel()
        if known and (largest := int(block_table.max())) >= rows:
            raise _checks.fail(op, "block_table", f"of pages below {rows}", largest)
    if isinstance(lengths, Tensor):
        _integers(op, "lengths", lengths, q)
        _checks.shape(op, "lengths", lengths, (batch,))
        if lengths.is_cpu and not torch.compiler.is_compiling():  # else only the device knows
            for length in lengths.tolist():
                _in_cache(op, length, keys)
    elif isinstance(lengths, bool) or not isinstance(lengths, (int, torch.SymInt)):
        raise TypeError(f"{op}: lengths must be a tensor or an int, got {type(lengths).__name__}")
    else:
        _in_cache(op, lengths, keys)

    if window is not None and window < 1:
        raise _checks.fail(op, "window", "1 or more", window)
    if softcap is not None:
        _checks.positive(op, "softcap", softcap)
    if alibi_slopes is not None:
        _checks.floating(op, "alibi_slopes", alibi_slopes)
        _checks.rank(op, "alibi_slopes", alibi_slopes, 1, 2)
        _checks.shape(op, "alibi_slopes", alibi_slopes, (batch, heads)[2 - alibi_slopes.dim() :])
        _checks.same_device(op, "alibi_slopes", alibi_slopes, q)
    if sinks is not None:
        _checks.floating(op, "sinks", sinks)
        _checks.shape(op, "sinks", sinks, (heads,))
        _checks.same_device(op, "sinks", sinks, q)
    if mask is not None:
        _checks.tensor(op, "mask", mask)
        if mask.dtype != torch.bool and mask.dtype not in _checks.FLOATS:
            raise TypeError(f"{op}: mask must be bool or floating-point, got {mask.dtype}")
        _checks.same_device(op, "mask", mask, q)
        full = (*q.shape[:3], keys)
        pairs = zip(reversed(mask.shape), reversed(full), strict=False)
        if mask.dim() > 4 or any(n not in (1, m) for n, m in pairs):
            raise _checks.fail(op, "mask", f"broadcastable to {list(full)}", list(mask.shape))


def _check_scales(name: str, scales: Tensor | None, cache: Tensor) -> None:
    op = "decode_attention"
    if scales is None:
        raise _checks.fail(op, name, "given for an int8 cache", None)
    _checks.floating(op, name, scales)
    if scales.dtype not in (torch.float32, torch.float16):
        raise _checks.fail(op, name, "float32 or float16", scales.dtype)
    _checks.shape(op, name, scales, cache.shape[:3])
    _checks.same_device(op, name, scales, cache)


def _integers(op: str, argument: str, value: Tensor, like: Tensor) -> None:
    _checks.tensor(op, argument, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {argument} must be int32 or int64, got {value.dtype}")
    _checks.same_device(op, argument, value, like)


def _in_cache(op: str, length: int, keys: int) -> None:
    if not 0 <= length <= keys:
        raise _checks.fail(op, "lengths", f"between 0 and {keys}, the cache's size", length)
