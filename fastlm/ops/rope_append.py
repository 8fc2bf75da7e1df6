"""Rotary position embedding of a decoding step, with the keys and values put into their cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import by_backend, define, direct, needs_grad
from fastlm.ops._registry import Backend, choose, native, register, triton
from fastlm.ops.decode_attention import _integers
from fastlm.ops.rope import _empty_in_order, check_width

_OP = "rope_append"
_NATIVE = native(torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD = 1024


def _unsupported(dtype: torch.dtype, *, head: int) -> list[str]:
    reasons = _NATIVE(dtype)
    if head > _MAX_HEAD:
        reasons.append(f"takes heads of at most {_MAX_HEAD} elements, not {head}")
    return reasons


register(
    _OP,
    Backend("cuda", ("cuda",), _unsupported),
    Backend("cpu", ("cpu",), _unsupported),
    triton(_unsupported),
)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *rest: object,
) -> Tensor:
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.same_device(_OP, name, x, q)
    return _empty_in_order(q)


_append = define(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, Tensor? lengths, SymInt length, Tensor? block_table, Tensor? q_weight,"
    " Tensor? k_weight, int rotary, bool interleaved, float eps, float offset) -> Tensor",
    _fake,
)
_APPEND = by_backend(_OP, _append)
_DIRECT = {name: direct(operator) for name, operator in _APPEND.items()}


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    *,
    block_table: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> Tensor:
    """k_cache[b,:,p_t] = turn(norm(k[b,:,t]), p_t), v_cache[b,:,p_t] = v[b,:,t]; turn(norm(q)).

    Token t of sequence b stands at p_t = lengths[b] - T + t. turn(x, p) is `fastlm.ops.rope` with
    row p of the tables; norm(x) = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over a
    head, where a weight is given. What comes back and the caches are what
    `fastlm.ops.decode_attention` takes with the same lengths.

    Args:
        q: [B, Hq, T, D], any strides; fp32, bf16, fp16 or fp64.
        k: [B, Hkv, T, D] of q's dtype, any strides.
        v: [B, Hkv, T, Dv], the same.
        cos: [S, w] of q's dtype or fp32, one row per position, w as in `fastlm.ops.rope`; None
            with a sin of None: nothing turns.
        sin: like cos.
        k_cache: [B, Hkv, keys, D] of q's dtype, any strides but the last one, which is 1; or pages
            [blocks, Hkv, block_size, D]. Written in place, like v_cache.
        v_cache: like k_cache, last dimension Dv.
        lengths: int32 or int64 [B], or one int for all: the keys of each sequence, the T new ones
            included; T <= lengths. On a GPU it is read by the kernel alone.
        block_table: int32 or int64 [B, n]: the pages of each sequence in order; only those that
            take a new token are looked at.
        interleaved: pairs of neighbours instead of the two halves.
        rotary_dim: as in `fastlm.ops.rope`.
        q_weight: [D] of q's dtype or fp32, the norm of a query's head; None: no norm.
        k_weight: the same for keys.
        eps: of both norms.
        weight_offset: 1.0 for weights stored as a difference from one.

    Returns:
        q, normalised and turned, in the memory order of q.

    Raises:
        ValueError: a shape, dtype, device or length that does not fit; nothing is written then.
        TypeError: an argument of the wrong kind.
        RuntimeError: a gradient is wanted; what is written in place has none.

    Computed in fp32 with one rounding at the end; the same input gives the same bits for any number
    of threads, and a sequence the same bits alone as in a batch. On a GPU nobody looks at lengths
    and pages beforehand: a kernel writes nothing for a token whose place lies outside of the cache
    or the tables, and its q is zero.
    Source: Su et al., arXiv:2104.09864, equation 34; Dehghani et al., arXiv:2302.05442 (norms).

    >>> k_cache, v_cache = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    >>> quarter_turns = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    >>> x = torch.tensor([[[[1.0, 0.0]]]])
    >>> rope_append(x, x, x, *quarter_turns, k_cache, v_cache, 2)
    tensor([[[[0., 1.]]]])
    >>> k_cache[0, 0], v_cache[0, 0, 1]
    (tensor([[0., 0.],
            [0., 1.],
            [0., 0.]]), tensor([1., 0.]))
    """
    tensors = q, k, v, cos, sin, k_cache, v_cache, lengths, block_table, q_weight, k_weight
    try:
        if needs_grad(q, k, v, cos, sin, k_cache, v_cache, q_weight, k_weight):
            raise RuntimeError(
                f"{_OP}: no argument may require a gradient, for the cache is written in place;"
                " call it in torch.no_grad() or torch.inference_mode()"
            )
        head = max(q.shape[-1], v.shape[-1])
        backend = choose(_OP, q, head=head)
        if backend != "cpu":  # whose binding looks itself, for calls of a few microseconds
            _check(*tensors, rotary_dim, eps)
        if backend != "reference":
            many, one = (lengths, 0) if isinstance(lengths, Tensor) else (None, lengths)
            width = 0 if cos is None else cos.shape[-1]
            rotary = reference.rotated_width(q.shape[-1], width, rotary_dim)
            places = k_cache, v_cache, many, one, block_table
            form = q_weight, k_weight, rotary, interleaved, eps, weight_offset
            run = (_APPEND if is_dynamo_compiling() else _DIRECT)[backend]
            turned: Tensor = run(q, k, v, cos, sin, *places, *form)
            if torch.is_grad_enabled() and not is_dynamo_compiling():
                increment_version((k_cache, v_cache))  # the caches may be kept for a backward
            return turned
    except Exception:
        _check(*tensors, rotary_dim, eps)  # names the argument at fault
        raise
    return reference.rope_append(
        q,
        k,
        v,
        cos,
        sin,
        k_cache,
        v_cache,
        lengths,
        block_table=block_table,
        interleaved=interleaved,
        rotary_dim=rotary_dim,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        weight_offset=weight_offset,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    block_table: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary_dim: int | None,
    eps: float,
) -> None:
    _checks.floating(_OP, "q", q)
    _checks.rank(_OP, "q", q, 4)
    batch, _, tokens, size = q.shape
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.floating(_OP, name, x)
        _checks.rank(_OP, name, x, 4)
        _checks.same_dtype(_OP, name, x, q)
        _checks.same_device(_OP, name, x, q)
    kv_heads, value_size = k.shape[1], v.shape[3]
    _checks.shape(_OP, "k", k, (batch, kv_heads, tokens, size))
    _checks.shape(_OP, "v", v, (batch, kv_heads, tokens, value_size))
    keys = k_cache.shape[2]
    rows = batch if block_table is None else k_cache.shape[0]
    _checks.shape(_OP, "k_cache", k_cache, (rows, kv_heads, keys, size))
    _checks.shape(_OP, "v_cache", v_cache, (rows, kv_heads, keys, value_size))
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise _checks.fail(_OP, name, "of a last stride of 1", f"strides {list(x.stride())}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _like_or_wide(name, weight, q)
            _checks.shape(_OP, name, weight, (size,))
    if q_weight is not None and k_weight is not None:
        _checks.same_dtype(_OP, "k_weight", k_weight, q_weight)
    if not eps >= 0:
        raise _checks.fail(_OP, "eps", "0 or more", eps)
    places = _check_tables(q, cos, sin, rotary_dim)
    if block_table is not None:
        _integers(_OP, "block_table", block_table, q)
        _checks.rank(_OP, "block_table", block_table, 2)
        _checks.shape(_OP, "block_table", block_table, (batch, block_table.shape[1]))
        keys *= block_table.shape[1]
    if isinstance(lengths, Tensor):
        _integers(_OP, "lengths", lengths, q)
        _checks.shape(_OP, "lengths", lengths, (batch,))
        if not lengths.is_cpu or torch.compiler.is_compiling():  # only the device knows
            return
        known = lengths.tolist()
    elif isinstance(lengths, bool) or not isinstance(lengths, (int, torch.SymInt)):
        raise TypeError(f"{_OP}: lengths must be a tensor or an int, got {type(lengths).__name__}")
    else:
        known = [lengths] * batch
    for b, length in enumerate(known):
        if not tokens <= length <= keys:
            wanted = f"between {tokens}, the new tokens, and {keys}, the cache's size"
            raise _checks.fail(_OP, "lengths", wanted, length)
        if places is not None and length > places:
            raise _checks.fail(_OP, "lengths", f"at most {places}, the rows of cos", length)
        if block_table is not None and block_table.is_cpu and not torch.compiler.is_compiling():
            block, first = k_cache.shape[2], length - tokens
            for page in block_table[b, first // block : -(-length // block)].tolist():
                if not 0 <= page < rows and tokens:
                    raise _checks.fail(_OP, "block_table", f"of pages 0 to {rows - 1}", page)


def _check_tables(
    q: Tensor, cos: Tensor | None, sin: Tensor | None, rotary_dim: int | None
) -> int | None:
    """The positions that the tables have rows for; None without tables."""
    if cos is None or sin is None:
        if cos is not sin:
            raise _checks.fail(_OP, "sin" if sin is None else "cos", "given with the other", None)
        if rotary_dim is not None:
            raise _checks.fail(_OP, "rotary_dim", "None without tables", rotary_dim)
        return None
    _like_or_wide("cos", cos, q)
    _checks.rank(_OP, "cos", cos, 2)
    _checks.floating(_OP, "sin", sin)
    _checks.shape(_OP, "sin", sin, cos.shape)
    _checks.same_dtype(_OP, "sin", sin, cos)
    _checks.same_device(_OP, "sin", sin, q)
    check_width(_OP, q.shape[-1], cos.shape[-1], rotary_dim)
    return cos.shape[0]


def _like_or_wide(name: str, x: Tensor, q: Tensor) -> None:
    """Checks that x is of q's type or fp32, on q's device."""
    _checks.floating(_OP, name, x)
    if x.dtype not in (q.dtype, torch.float32):
        raise _checks.fail(_OP, name, f"{q.dtype} or torch.float32", x.dtype)
    _checks.same_device(_OP, name, x, q)
