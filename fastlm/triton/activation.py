"""Activations, plain and gated, forward and backward.

Computes   y = act(x), y = act(gate) * up, and the gradients of both
Algorithm  pointwise; the backward pass computes act and its slope anew from the input
Tile       [rows x columns] of two-dimensional views, so that halves of one tensor are read and
           written where they lie; one long row where everything is contiguous
Traffic    reads every input once, writes every output once
Numerics   fp32 inside, one rounding to the element type; tanh by a sigmoid, which does not cancel
Source     arXiv:1606.08415, arXiv:2109.08668, arXiv:2002.05202
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from fastlm.triton._configs import select
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import (
    activate,
    activate_slope,
    as_rows,
    ceil_div,
    fit,
    new_like,
    place,
    power_of_two,
)


@kernel(do_not_specialize=["rows"])
def _forward(
    x,
    up,
    y,
    rows,
    cols,
    x_stride,
    up_stride,
    y_stride,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, inside = place(rows, cols, ROWS, BLOCK)
    out = activate(tl.load(x + row * x_stride + col, mask=inside).to(tl.float32), KIND)
    if up is not None:
        out *= tl.load(up + row * up_stride + col, mask=inside).to(tl.float32)
    tl.store(y + row * y_stride + col, out, mask=inside)


@kernel(do_not_specialize=["rows"])
def _backward(
    grad,
    x,
    up,
    dx,
    dup,
    rows,
    cols,
    grad_stride,
    x_stride,
    up_stride,
    dx_stride,
    dup_stride,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, inside = place(rows, cols, ROWS, BLOCK)
    g = tl.load(grad + row * grad_stride + col, mask=inside).to(tl.float32)
    v = tl.load(x + row * x_stride + col, mask=inside).to(tl.float32)
    y, slope = activate_slope(v, KIND)
    if up is not None:
        u = tl.load(up + row * up_stride + col, mask=inside).to(tl.float32)
        tl.store(dup + row * dup_stride + col, g * y, mask=inside)
        slope *= u
    tl.store(dx + row * dx_stride + col, g * slope, mask=inside)


def _run(pointwise, tensors: tuple[Tensor | None, ...], kind: int) -> None:
    """Launches over tensors of one shape, as rows, or as one row where all are contiguous."""
    here = [t for t in tensors if t is not None]
    first = here[0]
    if first.numel() == 0:
        return
    if all(t.is_contiguous() for t in here):
        cols = first.numel()
        views = [(t, cols) for t in tensors]
    else:
        cols = first.shape[-1]
        views = [(None, 0) if t is None else as_rows(t) for t in tensors]
    rows = first.numel() // cols
    config = select("activation", cols, first.get_device())
    block = min(power_of_two(cols), config.tile[0])
    tile_rows = config.tile[0] // block
    pointwise(
        (ceil_div(rows, tile_rows) * ceil_div(cols, block), 1, 1),
        tuple([t for t, _ in views]),
        (rows, cols, *[stride for _, stride in views]),
        config,
        KIND=kind,
        ROWS=tile_rows,
        BLOCK=block,
    )


def activation(x: Tensor, kind: int) -> Tensor:
    """The operator of this name."""
    y = new_like(x)
    _run(_forward, (x, None, y), kind)
    return y


def activation_backward(grad: Tensor, x: Tensor, kind: int) -> Tensor:
    """The operator of this name."""
    dx = new_like(x)
    _run(_backward, (grad, x, None, dx, None), kind)
    return dx


def gated_activation(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """The operator of this name."""
    fit("gated_activation", gate, up)
    y = new_like(gate)
    _run(_forward, (gate, up, y), kind)
    return y


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, kind: int
) -> tuple[Tensor, Tensor]:
    """The operator of this name."""
    dgate, dup = new_like(gate), new_like(up)
    _run(_backward, (grad, gate, up, dgate, dup), kind)
    return dgate, dup


def packed_activation(x: Tensor, kind: int) -> Tensor:
    """The operator of this name."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    gate, up = x.chunk(2, -1)
    y = new_like(gate)
    _run(_forward, (gate, up, y), kind)
    return y


def packed_activation_backward(grad: Tensor, x: Tensor, kind: int) -> Tensor:
    """The operator of this name."""
    dx = new_like(x)
    width = x.shape[-1]
    rows, made = (t.reshape(x.shape[:-1].numel(), width) for t in (x, dx))
    gate, up = rows.chunk(2, -1)
    dgate, dup = made.chunk(2, -1)
    _run(_backward, (grad, gate, up, dgate, dup), kind)
    return dx


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    x = torch.empty(8192, 14336, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(8192, 2 * 14336, dtype=torch.bfloat16, device="meta")
    for kind in (0, 1, 2, 3, 4):
        yield f"activation {kind}", partial(activation, x, kind)
        yield f"activation_backward {kind}", partial(activation_backward, x, x, kind)
    yield "gated_activation", partial(gated_activation, x, x, 0)
    yield "gated_activation_backward", partial(gated_activation_backward, x, x, x, 0)
    yield "packed_activation", partial(packed_activation, packed, 0)
    yield "packed_activation_backward", partial(packed_activation_backward, x, packed, 0)
