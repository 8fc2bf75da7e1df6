"""rms_norm and layer_norm, forward and backward, with the residual addition fused in.

Computes   y = (s - c mean(s)) / sqrt(mean((s - c mean(s))^2) + eps) * (weight + offset) + bias,
           s = x + residual rounded to x's type, c = 1 for layer_norm and 0 for rms_norm
Algorithm  a row lives in registers: read once, reduced, scaled. Backward: as many programs as the
           device can hold walk over the rows, each with its own sums of the weight's gradient; a
           second kernel adds the programs' sums. Rows too wide for registers are read three times
           and their weight gradient is summed over tiles of columns.
Tile       [rows x columns], columns a power of two with a masked tail; narrow rows share a program
Traffic    forward reads x, writes y; backward reads grad and x, writes dx; fp32 sums aside
Numerics   fp32 statistics, the variance in two passes over the registers; sums of the weights'
           gradients in fp32 in an order that depends on shape and device alone: no atomics
Source     arXiv:1910.07467, arXiv:1607.06450
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton._configs import multiprocessors, select
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import as_rows, ceil_div, dense, fit, new_like, power_of_two


@triton.jit
def _read(x, residual, row, col, x_stride, residual_stride, inside):
    """s = x + residual as it is rounded to x's type, in fp32."""
    s = tl.load(x + row * x_stride + col, mask=inside, other=0.0)
    if residual is not None:
        r = tl.load(residual + row * residual_stride + col, mask=inside, other=0.0)
        s = (s.to(tl.float32) + r.to(tl.float32)).to(s.dtype)
    return s.to(tl.float32)


@triton.jit
def _scale(weight, col, cols, offset):
    return tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32) + offset


@triton.jit
def _write(y, s, factor, weight, bias, row, col, cols, offset, inside):
    out = s * factor
    if weight is not None:
        out = out * _scale(weight, col, cols, offset)
    if bias is not None:
        out = out + _scale(bias, col, cols, 0.0)
    tl.store(y + row * cols + col, out, mask=inside)


@kernel(do_not_specialize=["rows"])
def _forward(
    x,
    residual,
    weight,
    bias,
    y,
    summed,
    rows,
    cols,
    x_stride,
    residual_stride,
    eps,
    offset,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < cols)
    s = _read(x, residual, row, col, x_stride, residual_stride, inside)
    if summed is not None:
        tl.store(summed + row * cols + col, s, mask=inside)
    if CENTERED:
        s = tl.where(inside, s - tl.sum(s, 1, keep_dims=True) / cols, 0.0)
    factor = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / cols + eps)
    _write(y, s, factor, weight, bias, row, col, cols, offset, inside)


@triton.jit
def _statistics(
    x,
    residual,
    row,
    cols,
    x_stride,
    residual_stride,
    eps,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean (or 0) and factor of one row that is read tile by tile."""
    mean = 0.0
    if CENTERED:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            sums += _read(x, residual, row, col, x_stride, residual_stride, col < cols)
        mean = tl.sum(sums, 0) / cols
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        s = _read(x, residual, row, col, x_stride, residual_stride, col < cols)
        s = tl.where(col < cols, s - mean, 0.0)
        squares += s * s
    return mean, tl.rsqrt(tl.sum(squares, 0) / cols + eps)


@kernel(do_not_specialize=["rows"])
def _forward_wide(
    x,
    residual,
    weight,
    bias,
    y,
    summed,
    rows,
    cols,
    x_stride,
    residual_stride,
    eps,
    offset,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean, factor = _statistics(
        x, residual, row, cols, x_stride, residual_stride, eps, CENTERED, BLOCK
    )
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < cols
        s = _read(x, residual, row, col, x_stride, residual_stride, inside)
        if summed is not None:
            tl.store(summed + row * cols + col, s, mask=inside)
        _write(y, s - mean, factor, weight, bias, row, col, cols, offset, inside)


@kernel(do_not_specialize=["rows"])
def _backward(
    grad,
    grad_summed,
    x,
    weight,
    dx,
    partial,
    rows,
    cols,
    grad_stride,
    grad_summed_stride,
    x_stride,
    eps,
    offset,
    CENTERED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        scale = _scale(weight, col, cols, offset)
        weight_sums = tl.zeros([ROWS, BLOCK], tl.float32)
        if BIAS:
            bias_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (col < cols)
        s = _read(x, None, row, col, x_stride, 0, inside)
        g = tl.load(grad + row * grad_stride + col, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            s = tl.where(inside, s - tl.sum(s, 1, keep_dims=True) / cols, 0.0)
        factor = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / cols + eps)
        s = s * factor
        if weight is not None:
            weight_sums += g * s
            if BIAS:
                bias_sums += g
            g = g * scale
        out = g - s * (tl.sum(g * s, 1, keep_dims=True) / cols)
        if CENTERED:
            out = out - tl.sum(g, 1, keep_dims=True) / cols
        out = out * factor
        if grad_summed is not None:
            out += _read(grad_summed, None, row, col, grad_summed_stride, 0, inside)
        tl.store(dx + row * cols + col, out, mask=inside)
    if weight is not None:
        col = tl.arange(0, BLOCK)
        at = partial + program.to(tl.int64) * cols + col
        tl.store(at, tl.sum(weight_sums, 0), mask=col < cols)
        if BIAS:
            at += programs.to(tl.int64) * cols
            tl.store(at, tl.sum(bias_sums, 0), mask=col < cols)


@kernel(do_not_specialize=["rows"])
def _backward_wide(
    grad,
    grad_summed,
    x,
    weight,
    dx,
    statistics,
    rows,
    cols,
    grad_stride,
    grad_summed_stride,
    x_stride,
    eps,
    offset,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean, factor = _statistics(x, None, row, cols, x_stride, 0, eps, CENTERED, BLOCK)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, factor)
    along, sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        g = _read(grad, None, row, col, grad_stride, 0, col < cols)
        if weight is not None:
            g = g * _scale(weight, col, cols, offset)
        along += g * ((_read(x, None, row, col, x_stride, 0, col < cols) - mean) * factor)
        sums += g
    share = tl.sum(along, 0) / cols
    middle = tl.sum(sums, 0) / cols
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < cols
        g = _read(grad, None, row, col, grad_stride, 0, inside)
        if weight is not None:
            g = g * _scale(weight, col, cols, offset)
        s = (_read(x, None, row, col, x_stride, 0, inside) - mean) * factor
        out = g - s * share
        if CENTERED:
            out = out - middle
        out = out * factor
        if grad_summed is not None:
            out += _read(grad_summed, None, row, col, grad_summed_stride, 0, inside)
        tl.store(dx + row * cols + col, out, mask=inside)


@kernel(do_not_specialize=["rows"])
def _weight_gradient_wide(
    grad,
    x,
    statistics,
    partial,
    rows,
    cols,
    grad_stride,
    x_stride,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (col < cols)
        mean = tl.load(statistics + 2 * row, mask=row < rows, other=0.0)
        factor = tl.load(statistics + 2 * row + 1, mask=row < rows, other=0.0)
        g = _read(grad, None, row, col, grad_stride, 0, inside)
        weight_sums += g * ((_read(x, None, row, col, x_stride, 0, inside) - mean) * factor)
        bias_sums += g
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = partial + program.to(tl.int64) * cols + col
    tl.store(at, tl.sum(weight_sums, 0), mask=col < cols)
    if BIAS:
        tl.store(at + programs.to(tl.int64) * cols, tl.sum(bias_sums, 0), mask=col < cols)


@kernel(do_not_specialize=["count"])
def _add_up(
    partial,
    weight_out,
    bias_out,
    count,
    cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of `count` rows; of as many more behind them for the bias."""
    which = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = partial + (which * count + row).to(tl.int64) * cols + col
        sums += tl.load(at, mask=(row < count) & (col < cols), other=0.0)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(sums, 0)
    if which == 0:
        tl.store(weight_out + col, total, mask=col < cols)
    elif bias_out is not None:
        tl.store(bias_out + col, total, mask=col < cols)


def _check(x: Tensor, other: Tensor | None, *vectors: Tensor | None) -> None:
    """What keeps a kernel from reading the wrong memory; the facade words it better."""
    fit("norm", x, other)
    for v in vectors:
        if v is not None and (v.shape != x.shape[-1:] or v.device != x.device):
            raise RuntimeError("norm: the arguments do not fit each other")
    if x.dim() == 0:
        raise RuntimeError("norm: a scalar has no rows")


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and s where there is a residual."""
    _check(x, residual, weight, bias)
    y, summed = new_like(x), None if residual is None else new_like(x)
    if x.numel() == 0:
        return y, summed
    cols = x.shape[-1]
    count = x.numel() // cols
    x, x_stride = as_rows(x)
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = as_rows(residual)
    block = power_of_two(cols)
    config = select("norm", block, x.get_device())
    tensors = x, residual, dense(weight), dense(bias), y, summed
    numbers = count, cols, x_stride, residual_stride, eps, offset
    size = config.tile[0]
    if block > size:
        _forward_wide((count, 1, 1), tensors, numbers, config, CENTERED=centered, BLOCK=size)
        return y, summed
    rows = size // block
    grid = ceil_div(count, rows), 1, 1
    _forward(grid, tensors, numbers, config, CENTERED=centered, ROWS=rows, BLOCK=block)
    return y, summed


def backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: bool,
    eps: float,
    offset: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; without weight the latter two are [0, cols]."""
    _check(x, grad_summed, weight, None)
    dx, cols = new_like(x), x.shape[-1]
    bias = bias and weight is not None
    weight = dense(weight)
    none = x.new_empty((0, cols), dtype=torch.float32)
    dweight = none if weight is None else new_like(weight)
    dbias = new_like(dweight) if bias else none
    count = x.numel() // max(cols, 1)
    if cols == 0:
        return dx, dweight, dbias
    (x, x_stride), (grad, grad_stride) = as_rows(x), as_rows(grad)
    grad_summed_stride = 0
    if grad_summed is not None:
        grad_summed, grad_summed_stride = as_rows(grad_summed)
    device, block = x.get_device(), power_of_two(cols)
    config = select("norm_backward", block, device)
    size, each = config.tile
    rows = max(size // block, 1)
    programs = min(multiprocessors(device) * each, ceil_div(count, rows))
    partial = None
    if weight is not None:
        partial = x.new_empty((2 if bias else 1, programs, cols), dtype=torch.float32)
    numbers = count, cols, grad_stride, grad_summed_stride, x_stride, eps, offset
    if block <= size:
        _backward(
            (programs, 1, 1),
            (grad, grad_summed, x, weight, dx, partial),
            numbers,
            config,
            CENTERED=centered,
            BIAS=bias,
            ROWS=rows,
            BLOCK=block,
        )
    else:
        statistics = x.new_empty((count, 2), dtype=torch.float32)
        tensors = grad, grad_summed, x, weight, dx, statistics
        _backward_wide((count, 1, 1), tensors, numbers, config, CENTERED=centered, BLOCK=size)
        if partial is not None:
            tile = select("norm_weight_gradient", cols, device)
            rows, block = tile.tile
            _weight_gradient_wide(
                (ceil_div(cols, block), programs, 1),
                (grad, x, statistics, partial),
                (count, cols, grad_stride, x_stride),
                tile,
                BIAS=bias,
                ROWS=rows,
                BLOCK=block,
            )
    if partial is not None:
        tile = select("norm_weight_gradient", cols, device)
        rows, block = tile.tile
        _add_up(
            (ceil_div(cols, block), 2 if bias else 1, 1),
            (partial, dweight, dbias if bias else None),
            (programs, cols),
            tile,
            ROWS=rows,
            BLOCK=block,
        )
    return dx, dweight, dbias
