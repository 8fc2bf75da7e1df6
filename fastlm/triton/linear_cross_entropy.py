"""linear_cross_entropy: chunks of rows, products by the library, the loss by cross_entropy.py.

The logits of a chunk become their own gradient in place and are then multiplied into the gradients
of x and weight, which are summed in fp32. Chunks are large: each reads and writes the weight's fp32
gradient once, which at 4096 rows costs 6 % of the products. No number comes back from the device.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastlm.triton._configs import select
from fastlm.triton._primitives import ceil_div
from fastlm.triton.cross_entropy import _MEAN, _NONE, Losses, misfit


def _product(a: Tensor, b: Tensor, sums: Tensor, add: bool) -> None:
    """sums = a b, or += where `add`, in fp32 whatever a and b are."""
    if a.dtype == torch.float32:
        torch.addmm(sums, a, b, beta=float(add), out=sums)
    elif a.is_cuda and add:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=sums)
    else:  # the interpreter's CPU has no such product
        torch.addmm(sums, a.float(), b.float(), beta=float(add), out=sums)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: int,
    dx: bool,
    dweight: bool,
    dbias: bool,
    chunk_rows: int,
    library: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of this name; chunk_rows 0: as many as the table says."""
    classes, width = weight.shape
    if x.dim() != 2 or misfit(x.shape[:1], x, target, classes, class_weight, token_weight):
        raise RuntimeError("linear_cross_entropy: the arguments do not fit each other")
    count = target.numel()
    options = ignore_index, smoothing, z_loss, softcap, reduction == _MEAN
    made = Losses(target, class_weight, token_weight, classes, *options)
    most = chunk_rows or select("linear_cross_entropy", classes, x.get_device()).tile[0]
    size = ceil_div(count, max(ceil_div(count, most), 1))  # chunks of equal size
    buffer = x.new_empty((size, classes))
    # with no rows the sums are zero
    new = x.new_empty if count else x.new_zeros
    x_sums = new((count, width) if dx else (0,), dtype=torch.float32)
    weight_sums = new((classes, width) if dweight else (0,), dtype=torch.float32)
    bias_sums = x.new_zeros(classes if dbias else 0, dtype=torch.float32)
    for first in range(0, count, max(size, 1)):
        chunk = x[first : first + size]
        logits = buffer[: chunk.shape[0]]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        made.rows(logits, logits if dx or dweight or dbias else None, first)
        if dx:
            _product(logits, weight, x_sums[first : first + size], False)
        if dweight:
            _product(logits.t(), chunk, weight_sums, first > 0)
        if dbias:
            bias_sums += logits.sum(0, dtype=torch.float32)
    loss = made.losses if reduction == _NONE else made.reduced()
    return loss, x_sums, weight_sums, bias_sums


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time: those of cross_entropy, in place."""
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    t = torch.empty(8192, dtype=torch.int64, device="meta")
    numbers = -100, 0.0, 0.0, 0.0, _MEAN, True, True, False, 0, True
    call = partial(linear_cross_entropy, x, weight, t, None, None, None, *numbers)
    yield "linear_cross_entropy", call
