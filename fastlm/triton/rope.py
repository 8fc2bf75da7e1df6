"""rope: rotary position embedding of queries and keys in one launch, and its transpose.

Computes   y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2 for the pairs of the first R elements, the
           rest copied; transposed (the backward pass) y1 = x1 cos1 + x2 sin2,
           y2 = x2 cos2 - x1 sin1
Algorithm  one program per token and block of heads, of q or of k; the token's angles stay in
           registers for all its heads
Tile       [heads x pairs]: both halves of a head, or neighbours split in registers
Traffic    reads and writes q and k once, over themselves where asked to, and the tables once
           a block of heads
Numerics   fp32 inside, one rounding to the element type
Source     arXiv:2104.09864
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton._configs import select
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import ceil_div, power_of_two


@triton.jit
def _angles(table, half, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """The angles of the first and of the second element of each pair."""
    pair = tl.arange(0, HALF)
    here = pair < half
    if not FULL:
        one = tl.load(table + pair, mask=here, other=0.0).to(tl.float32)
        two = one
    elif INTERLEAVED:
        one = tl.load(table + 2 * pair, mask=here, other=0.0).to(tl.float32)
        two = tl.load(table + 2 * pair + 1, mask=here, other=0.0).to(tl.float32)
    else:
        one = tl.load(table + pair, mask=here, other=0.0).to(tl.float32)
        two = tl.load(table + half + pair, mask=here, other=0.0).to(tl.float32)
    return one[None, :], two[None, :]


@triton.jit
def _turn(
    x,
    y,
    head,
    heads,
    x_head,
    y_head,
    cos,
    sin,
    half,
    head_dim,
    FULL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Some heads of one token of q or k."""
    cos1, cos2 = _angles(cos, half, FULL, INTERLEAVED, HALF)
    sin1, sin2 = _angles(sin, half, FULL, INTERLEAVED, HALF)
    row = (head + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    x += row * x_head
    y += row * y_head
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF)[None, :]
        inside = (row < heads) & (col < 2 * half)
        both = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(both, [HEADS, HALF, 2]))
    else:
        col = tl.arange(0, HALF)[None, :]
        inside = (row < heads) & (col < half)
        x1 = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + half + col, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    if IN_PLACE:
        tl.debug_barrier()  # several threads may hold an element: all read before one writes
    if INTERLEAVED:
        tl.store(y + col, tl.reshape(tl.join(y1, y2), [HEADS, 2 * HALF]), mask=inside)
    else:
        tl.store(y + col, y1, mask=inside)
        tl.store(y + half + col, y2, mask=inside)
    if REST > 0:
        col = 2 * half + tl.arange(0, REST)[None, :]
        inside = (row < heads) & (col < head_dim)
        tl.store(y + col, tl.load(x + col, mask=inside), mask=inside)


@kernel(do_not_specialize=["tokens"])
def _rotate(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    tokens,
    q_heads,
    k_heads,
    head_dim,
    half,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    qo_batch,
    qo_head,
    qo_token,
    ko_batch,
    ko_head,
    ko_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    FULL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    block = tl.program_id(1)
    of_q = tl.cdiv(q_heads, HEADS)
    if block < of_q:
        _turn(
            q + batch * q_batch + token * q_token,
            q_out + batch * qo_batch + token * qo_token,
            block * HEADS,
            q_heads,
            q_head,
            qo_head,
            cos,
            sin,
            half,
            head_dim,
            FULL,
            INTERLEAVED,
            TRANSPOSED,
            HEADS,
            HALF,
            REST,
            IN_PLACE,
        )
    elif k is not None:
        _turn(
            k + batch * k_batch + token * k_token,
            k_out + batch * ko_batch + token * ko_token,
            (block - of_q) * HEADS,
            k_heads,
            k_head,
            ko_head,
            cos,
            sin,
            half,
            head_dim,
            FULL,
            INTERLEAVED,
            TRANSPOSED,
            HEADS,
            HALF,
            REST,
            IN_PLACE,
        )


def _unit(x: Tensor) -> Tensor:
    """x with the elements of its last dimension side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _in_order(x: Tensor) -> Tensor:
    """Fresh memory of x's shape: tokens within heads or heads within tokens, as x lies."""
    batch, heads, tokens, size = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, tokens, heads, size)).transpose(1, 2)
    return x.new_empty((batch, heads, tokens, size))


def _launch(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotary: int,
    interleaved: bool,
    transposed: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if not _fits(q, k, cos, sin, rotary):
        raise RuntimeError("rope: the arguments do not fit each other")
    if in_place:
        _check_own_elements(q, k)
        q_out, k_out = q, k
    else:
        q_out, k_out = _in_order(q), None if k is None else _in_order(k)
    batch, q_heads, tokens, head_dim = q.shape
    q, cos, sin = _unit(q), _unit(cos), _unit(sin)
    k_heads = 0
    k_strides: tuple[int, ...] = (0, 0, 0)
    ko_strides: tuple[int, ...] = (0, 0, 0)
    if k is not None and k_out is not None:
        k = _unit(k)
        k_heads, k_strides, ko_strides = k.shape[1], k.stride()[:3], k_out.stride()[:3]
    half, rest = rotary // 2, head_dim - rotary
    pairs = power_of_two(half)
    config = select("rope", pairs, q.get_device())
    heads = min(power_of_two(max(q_heads, k_heads)), max(config.tile[0] // pairs, 1))
    if head_dim == 0:
        return q_out, k_out
    per_batch = cos.dim() == 3 and cos.shape[0] > 1
    _rotate(
        (batch * tokens, ceil_div(q_heads, heads) + ceil_div(k_heads, heads), 1),
        (q, k, cos, sin, q_out, k_out),
        (
            tokens,
            q_heads,
            k_heads,
            head_dim,
            half,
            *q.stride()[:3],
            *k_strides,
            *q_out.stride()[:3],
            *ko_strides,
            cos.stride(0) if per_batch else 0,
            cos.stride(-2),
            sin.stride(0) if per_batch else 0,
            sin.stride(-2),
        ),
        config,
        FULL=cos.shape[-1] == rotary,
        INTERLEAVED=interleaved,
        TRANSPOSED=transposed,
        HEADS=heads,
        HALF=pairs,
        REST=power_of_two(rest) if rest and not in_place else 0,
        IN_PLACE=in_place,
    )
    return q_out, k_out


def _fits(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotary: int) -> bool:
    """What keeps the kernel from reading the wrong memory; the facade words it better."""
    width, leading = cos.shape[-1], cos.shape[:-1]
    batch, _, tokens, head_dim = q.shape
    return (
        0 < rotary <= head_dim
        and rotary % 2 == 0
        and width in (rotary, rotary // 2)
        and leading in ((tokens,), (1, tokens), (batch, tokens))
        and cos.shape == sin.shape
        and cos.dtype == sin.dtype
        and cos.dtype in (q.dtype, torch.float32)
        and cos.device == sin.device == q.device
        and (
            k is None
            or (
                k.dim() == 4
                and (k.shape[0], k.shape[2], k.shape[3]) == (batch, tokens, head_dim)
                and k.dtype == q.dtype
                and k.device == q.device
            )
        )
    )


def _check_own_elements(q: Tensor, k: Tensor | None) -> None:
    """Checks that q and k may be overwritten, each by itself."""
    for x in (q,) if k is None else (q, k):
        dense = x.shape[-1] <= 1 or x.stride(-1) == 1
        shared = any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))
        if shared or not dense:
            raise RuntimeError("rope_: x is expanded, or its last dimension is not dense")
    if k is not None and q.numel() and k.numel() and 0 != q.data_ptr() == k.data_ptr():
        raise RuntimeError("rope_: k lies where q does")


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary: int,
    interleaved: bool,
    transposed: bool,
) -> tuple[Tensor, Tensor | None]:
    """The operator of this name."""
    return _launch(q, k, cos, sin, rotary, interleaved, transposed)


def rope_single(
    x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool, transposed: bool
) -> Tensor:
    """The operator of this name."""
    return _launch(x, None, cos, sin, rotary, interleaved, transposed)[0]


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool) -> None:
    """The operator of this name."""
    _launch(q, k, cos, sin, rotary, interleaved, in_place=True)


def rope_single_(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool) -> None:
    """The operator of this name."""
    _launch(x, None, cos, sin, rotary, interleaved, in_place=True)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    for name, head, width in (("", 128, 128), (" partial", 80, 32)):
        q = torch.empty(2, 4096, 32, head, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        k = torch.empty(2, 4096, 8, head, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        table = torch.empty(4096, width, dtype=torch.float32, device="meta")
        for kind, interleaved in (("", False), (" interleaved", True)):
            call = partial(rope, q, k, table, table, width, interleaved, False)
            yield f"rope{name}{kind}", call
            call = partial(_launch, q, k, table, table, width, interleaved, in_place=True)
            yield f"rope{name}{kind} in place", call
    yield "rope backward", partial(rope, q, k, table, table, width, False, True)
