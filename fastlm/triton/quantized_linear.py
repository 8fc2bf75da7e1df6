"""quantized_linear.

Computes   y[m,n] = sum_g scale[n,g] sum_{k in g} q[n,k] x[m,k] + minimum[n,g] sum_{k in g} x[m,k]
Algorithm  several rows: one product a group of x and the integers, which the element type holds
           without rounding, scaled as it is added up. One row: weights in fp32 on the way
Tile       [rows of x, outputs], a group at a time; one row: [outputs, several groups]
Traffic    the integers and scales once for 64 rows, x once for a tile of outputs
Numerics   exact products, fp32 sums. 4 bits: byte j of a group holds values j and j + group / 2;
           a product takes them as -8 ... 7 and adds 8 steps to a minimum: as 0 ... 15 its sums and
           the minimum's would cancel each other's digits
Source     arXiv:2210.17323, section 5; the layout is GGUF's
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton import _configs
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import as_rows, ceil_div, dense, power_of_two


@triton.jit
def _transposed(q, like):
    """Integers as the factor of a product with `like`; through fp32, for the interpreter too."""
    return tl.trans(q.to(tl.float32).to(like.dtype))


@kernel(do_not_specialize=("num_rows",))
def multiply(
    x, values, scale, minimum, bias, y,
    x_row, num_rows, outputs, groups,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, outs = (m < num_rows)[:, None], n < outputs
    WIDTH: tl.constexpr = GROUP if BITS == 8 else GROUP // 2  # bytes, and values of one product
    k = tl.arange(0, WIDTH)
    from_x = x + m.to(tl.int64)[:, None] * x_row + k[None, :]
    from_values = values + n.to(tl.int64)[:, None] * (groups * WIDTH) + k[None, :]
    at = n.to(tl.int64) * groups
    acc = tl.zeros([BM, BN], tl.float32)
    for g in range(0, groups):
        low = tl.load(from_x + g * GROUP, mask=rows, other=0.0)
        q = tl.load(from_values + g * WIDTH, mask=outs[:, None], other=0)
        if BITS == 8:
            part = tl.dot(low, _transposed(q, low), input_precision=PRECISION)
        else:
            high = tl.load(from_x + g * GROUP + WIDTH, mask=rows, other=0.0)
            first, second = (q & 15).to(tl.int32) - 8, (q >> 4).to(tl.int32) - 8
            part = tl.dot(low, _transposed(first, low), input_precision=PRECISION)
            part = tl.dot(high, _transposed(second, low), part, input_precision=PRECISION)
        step = tl.load(scale + at + g, mask=outs, other=0.0).to(tl.float32)
        acc += part * step[None, :]
        if minimum is not None:
            total = tl.sum(low.to(tl.float32), 1) + tl.sum(high.to(tl.float32), 1)
            least = tl.load(minimum + at + g, mask=outs, other=0.0).to(tl.float32)
            acc += total[:, None] * (least + 8.0 * step)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=outs, other=0.0).to(tl.float32)[None, :]
    to = y + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=rows & outs[None, :])


@kernel()
def multiply_row(
    x, values, scale, minimum, bias, y,
    outputs, groups,
    BN: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    outs = (n < outputs)[:, None]
    WIDTH: tl.constexpr = GROUP if BITS == 8 else GROUP // 2
    row = n.to(tl.int64)[:, None]
    acc = tl.zeros([BN, BYTES], tl.float32)
    for first in range(0, groups * WIDTH, BYTES):
        b = first + tl.arange(0, BYTES)
        inside = b < groups * WIDTH
        seen = outs & inside[None, :]
        q = tl.load(values + row * (groups * WIDTH) + b[None, :], mask=seen, other=0)
        g = b // WIDTH
        at = row * groups + g[None, :]
        step = tl.load(scale + at, mask=seen, other=0.0).to(tl.float32)
        k = g * GROUP + b % WIDTH
        low = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        if BITS == 8:
            acc += q.to(tl.float32) * step * low
        else:
            high = tl.load(x + k + WIDTH, mask=inside, other=0.0).to(tl.float32)[None, :]
            one, two = (q & 15).to(tl.float32), (q >> 4).to(tl.float32)
            if minimum is None:
                acc += (one - 8.0) * step * low + (two - 8.0) * step * high
            else:
                least = tl.load(minimum + at, mask=seen, other=0.0).to(tl.float32)
                acc += (one * step + least) * low + (two * step + least) * high
    z = tl.sum(acc, 1)
    if bias is not None:
        z += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(y + n, z.to(y.dtype.element_ty), mask=n < outputs)


def quantized_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    int8: bool,
) -> Tensor:
    """The operator of this name, of a weight by rows."""
    rows, stride = as_rows(x)
    values, scale = dense(values), dense(scale)  # type: ignore[assignment]
    width, groups = x.shape[-1], scale.shape[1]
    y = x.new_empty((*x.shape[:-1], outputs))
    if width == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    count, group = x.numel() // width, width // groups
    bits = 8 if values.dtype == torch.int8 else 4
    tensors = (rows, values, scale, dense(minimum), dense(bias), y)
    if count == 1:
        config = _configs.select("quantized_row", width, x.get_device())
        bn, length = config.tile
        programs = ceil_div(outputs, bn)
        multiply_row(
            (programs, 1, 1), tensors, (outputs, groups), config,
            BN=bn, BYTES=length, GROUP=group, BITS=bits,
        )  # fmt: skip
        return y
    block = min(max(16, power_of_two(count)), 64)
    config = _configs.select("quantized_linear", block, x.get_device())
    bn = config.tile[1]
    multiply(
        (ceil_div(outputs, bn), ceil_div(count, block), 1),
        tensors,
        (stride, count, outputs, groups),
        config,
        BM=block,
        BN=bn,
        GROUP=group,
        BITS=bits,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )
    return y


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    x = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
    scale = x.new_empty(4096, 128, dtype=torch.float16)
    by_8, by_4 = (
        x.new_empty(4096, n, dtype=t) for n, t in ((4096, torch.int8), (2048, torch.uint8))
    )
    for count in (1, 16, 64):
        some = x[:count]
        call = partial(quantized_linear, some, by_8, scale, None, None, 4096, False)
        yield f"quantized_linear int8 {count}", call
        call = partial(quantized_linear, some, by_4, scale, scale, x[0], 4096, False)
        yield f"quantized_linear int4 {count}", call
