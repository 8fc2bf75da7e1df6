"""feed_forward: the hidden layer as one product with the activation in its epilogue.

Computes   hidden = act(x w_in^T + b_in), or act(x w_gate^T + b_gate) * (x w_in^T + b_in); backward
           the gradients of both projections, and hidden anew
Algorithm  one program a tile of hidden: both products walk over the same tile of x, the weights
           lie where they are. The table says up to which width this is expected to win; beyond,
           and in fp32, the library multiplies and one kernel activates. The other products are the
           library's
Tile       [rows of x, hidden], twice where gated; neighbouring programs share rows of weights
Traffic    x and weights as a product, hidden once; the projections only where they are kept
Numerics   fp32 sums in the order of x's columns, the activation on them, one rounding of each
           result: the same bits every time
Source     Shazeer, arXiv:2002.05202
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton._configs import Config, select
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import (
    activate,
    activate_slope,
    as_rows,
    ceil_div,
    dense,
    fit,
    new_like,
    power_of_two,
)

_FEW = 64  # rows up to which the weights' traffic decides
_BAND = 8  # tiles of rows that are worked through together, so that L2 keeps their weights


@triton.jit
def _biased(projected, bias, n, hidden):
    if bias is not None:
        projected += tl.load(bias + n, mask=n < hidden, other=0.0).to(tl.float32)[None, :]
    return projected


@kernel(do_not_specialize=["num_rows"])
def feed_forward_project(
    x, w_in, w_gate, b_in, b_gate, out, up, gate,
    num_rows, hidden, width, x_row, in_row, in_col, gate_row, gate_col,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BAND: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(num_rows, BM), tl.cdiv(hidden, BN)
    band = tl.program_id(0) // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * across)
    m = ((band * BAND + within % height) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (within // height * BN + tl.arange(0, BN)).to(tl.int64)
    k = tl.arange(0, BK).to(tl.int64)
    rows, outs = (m < num_rows)[:, None], (n < hidden)[None, :]
    from_x = x + m[:, None] * x_row + k[None, :]
    from_in = w_in + n[None, :] * in_row + k[:, None] * in_col
    sums = tl.zeros([BM, BN], tl.float32)
    if w_gate is not None:
        from_gate = w_gate + n[None, :] * gate_row + k[:, None] * gate_col
        gate_sums = tl.zeros([BM, BN], tl.float32)
    step = tl.full([], BK, tl.int64)
    for first in range(0, width, BK):
        if EVEN:
            a = tl.load(from_x, mask=rows, other=0.0)
            b = tl.load(from_in, mask=outs, other=0.0)
        else:
            inside = k < width - first
            a = tl.load(from_x, mask=rows & inside[None, :], other=0.0)
            b = tl.load(from_in, mask=outs & inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        if w_gate is not None:
            if EVEN:
                c = tl.load(from_gate, mask=outs, other=0.0)
            else:
                c = tl.load(from_gate, mask=outs & (k < width - first)[:, None], other=0.0)
            gate_sums = tl.dot(a, c, gate_sums, input_precision=PRECISION)
            from_gate += step * gate_col
        from_x += step
        from_in += step * in_col
    sums = _biased(sums, b_in, n, hidden)
    at, inside = m[:, None] * hidden + n[None, :], rows & outs
    if up is not None:
        tl.store(up + at, sums.to(up.dtype.element_ty), mask=inside)
    if w_gate is not None:
        gate_sums = _biased(gate_sums, b_gate, n, hidden)
        if gate is not None:
            tl.store(gate + at, gate_sums.to(gate.dtype.element_ty), mask=inside)
        sums *= activate(gate_sums, KIND)
    else:
        sums = activate(sums, KIND)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["count"])
def feed_forward_activate(
    up, gate, out, count, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up, or act(up) without a gate."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(up + at, mask=at < count).to(tl.float32)
    if gate is not None:
        y *= activate(tl.load(gate + at, mask=at < count).to(tl.float32), KIND)
    else:
        y = activate(y, KIND)
    tl.store(out + at, y, mask=at < count)


@kernel(do_not_specialize=["count"])
def feed_forward_slopes(
    grad, up, gate, out, grad_gate, count, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of hidden becomes that of up, in place; hidden and the gate's beside it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + at, mask=at < count).to(tl.float32)
    u = tl.load(up + at, mask=at < count).to(tl.float32)
    if gate is not None:
        y, slope = activate_slope(tl.load(gate + at, mask=at < count).to(tl.float32), KIND)
        tl.store(out + at, u * y, mask=at < count)
        tl.store(grad_gate + at, g * u * slope, mask=at < count)
        tl.store(grad + at, g * y, mask=at < count)
    else:
        y, slope = activate_slope(u, KIND)
        tl.store(out + at, y, mask=at < count)
        tl.store(grad + at, g * slope, mask=at < count)


def _config(x: Tensor, rows: int, keeps: bool) -> Config:
    """How the own product is cut; an empty tile: the library multiplies."""
    name = "feed_forward_kept" if keeps else "feed_forward"
    if rows <= _FEW:
        name = "feed_forward_few"
    if x.dtype == torch.float32:
        name = "feed_forward_fp32"
    return select(name, x.shape[-1], x.get_device())


def _one_way(w: Tensor) -> Tensor:
    """A matrix with unit stride in one dimension, so that a transposed view is read as it lies."""
    return w if 1 in w.stride() else w.contiguous()


def _pointwise(run: Any, tensors: tuple[Tensor | None, ...], kind: int) -> None:
    size = tensors[0].numel()  # type: ignore[union-attr]
    config = select("activation", size, tensors[0].get_device())  # type: ignore[union-attr]
    (block,) = config.tile
    run((ceil_div(size, block), 1, 1), tensors, (size,), config, KIND=kind, BLOCK=block)


def _hidden(
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    kind: int,
    keeps: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden, and where they are kept the projections up and gate."""
    fit("feed_forward", w_in, w_gate)
    hidden, width = w_in.shape
    if x.dim() == 0 or x.shape[-1] != width or x.dtype != w_in.dtype or x.device != w_in.device:
        raise RuntimeError("feed_forward: the arguments do not fit each other")
    for bias in (b_in, b_gate):
        if bias is not None and (bias.shape != w_in.shape[:1] or bias.dtype != x.dtype):
            raise RuntimeError("feed_forward: the arguments do not fit each other")
    shape = (*x.shape[:-1], hidden)
    count = x.shape[:-1].numel()
    config = _config(x, count, keeps)
    up = gate = None
    if not config.tile:
        up = F.linear(x, w_in, b_in)
        gate = None if w_gate is None else F.linear(x, w_gate, b_gate)
        out = new_like(up)
        _pointwise(feed_forward_activate, (up, gate, out), kind)
        return out, up, gate
    out = x.new_empty(shape)
    if keeps:
        up, gate = x.new_empty(shape), None if w_gate is None else x.new_empty(shape)
    if width == 0:  # a sum of nothing, which has no row to stride over
        x, x_row = x.new_empty(0), 0
    else:
        x, x_row = as_rows(x)
    w_in, w_gate = _one_way(w_in), None if w_gate is None else _one_way(w_gate)
    bm, bn, bk = config.tile
    bm = min(bm, max(16, power_of_two(count)))
    feed_forward_project(
        (ceil_div(count, bm) * ceil_div(hidden, bn), 1, 1),
        (x, w_in, w_gate, dense(b_in), dense(b_gate), out, up, gate),
        (
            count,
            hidden,
            width,
            x_row,
            *w_in.stride(),
            *((0, 0) if w_gate is None else w_gate.stride()),
        ),
        config,
        KIND=kind,
        BM=bm,
        BN=bn,
        BK=bk,
        BAND=_BAND,
        EVEN=width % bk == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )
    return out, up, gate


def feed_forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
    kind: int,
) -> Tensor:
    """The operator of this name: nothing is kept for gradients."""
    return F.linear(_hidden(x, w_in, w_gate, b_in, b_gate, kind, False)[0], w_out, b_out)


def feed_forward_hidden(
    x: Tensor,
    w_in: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_gate: Tensor | None,
    kind: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The operator of this name: hidden, up, and gate, which is empty without w_gate."""
    out, up, gate = _hidden(x, w_in, w_gate, b_in, b_gate, kind, True)
    return out, up, x.new_empty(0) if gate is None else gate


def feed_forward_backward(
    grad: Tensor, up: Tensor, gate: Tensor | None, kind: int
) -> tuple[Tensor, Tensor]:
    """The operator of this name: hidden and the gradient of gate; grad becomes that of up."""
    fit("feed_forward", up, gate, grad)
    if not grad.is_contiguous():
        raise RuntimeError("feed_forward: the gradient of hidden must be contiguous")
    up, gate = up.contiguous(), dense(gate)
    out, grad_gate = new_like(up), up.new_empty(0 if gate is None else up.shape)
    made = None if gate is None else grad_gate
    _pointwise(feed_forward_slopes, (grad, up, gate, out, made), kind)
    return out, grad_gate


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    x = torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta")
    w = x.new_empty(5632, 2048)
    b = w[:, 0].contiguous()
    for kind in (0, 1):
        yield f"feed_forward gated {kind}", partial(_hidden, x, w, w, None, None, kind, False)
    yield "feed_forward gated, kept", partial(_hidden, x, w, w, b, b, 0, True)
    yield "feed_forward plain, kept", partial(_hidden, x, w, None, b, None, 1, True)
    turned = x.new_empty(2040, 5632, dtype=torch.float16).t()
    tails = x.new_empty(64, 2040, dtype=torch.float16)
    yield "feed_forward transposed", partial(_hidden, tails, turned, turned, None, None, 0, False)
    yield "feed_forward one row", partial(_hidden, x[:1], w, w, None, None, 0, False)
    for dtype, keeps in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        wide = x.new_empty(128, 8192, dtype=dtype)
        by_library = partial(_hidden, wide, wide, wide, None, None, 0, keeps)
        yield f"feed_forward by the library {dtype}".replace("torch.", ""), by_library
    yield "feed_forward_backward", partial(feed_forward_backward, x, x, x, 0)
    yield "feed_forward_backward plain", partial(feed_forward_backward, x, x, None, 1)
