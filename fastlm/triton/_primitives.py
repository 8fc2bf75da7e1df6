"""What several kernels share: views of tensors as rows, and functions of tiles.

Device functions take and return fp32 and hold for any tile shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and the distance of its rows [-1, x.shape[-1]], elements of a row side by side.

    A copy is made only where no one distance leads from each row to the next.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        try:
            rows = x.view(-1, x.shape[-1])
            return rows, rows.stride(0)
        except RuntimeError:  # the leading dimensions do not merge
            pass
    return x.contiguous(), x.shape[-1]


def new_like(x: Tensor) -> Tensor:
    """Fresh memory like x, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def dense(x: Tensor | None) -> Tensor | None:
    """x, contiguous."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def fit(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Refuses tensors of another shape, type or device: a kernel would read the wrong memory."""
    for t in others:
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype or t.device != x.device):
            raise RuntimeError(f"{op}: the arguments do not fit each other")


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_slope(x):
    """The sigmoid and its derivative s (1 - s), without the cancellation in 1 - s."""
    e = tl.exp(-tl.abs(x))
    s = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * s, s), e * s * s


@triton.jit
def tanh(x):
    """tanh(x): a polynomial near zero, where the form by exponentials would cancel (Cephes)."""
    size = tl.abs(x)
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = x + x * square * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x); KIND is its place in fastlm.ops.activation.KINDS."""
    if KIND == 0:
        y = x * sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        # (1 + tanh u) / 2 = sigmoid(2u)
        y = x * sigmoid(x * (1.5957691216057308 + 0.07135481282805219 * x * x))
    elif KIND == 3:
        y = tl.where(x < 0.0, 0.0, x)  # NaN stays
    else:
        relu = tl.where(x < 0.0, 0.0, x)
        y = relu * relu
    return y


@triton.jit
def activate_slope(x, KIND: tl.constexpr):
    """act(x) and its derivative."""
    if KIND == 0:
        s, ds = sigmoid_slope(x)
        y = x * s
        slope = s + x * ds
    elif KIND == 1:
        half = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * half
        slope = half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == 2:
        s, ds = sigmoid_slope(x * (1.5957691216057308 + 0.07135481282805219 * x * x))
        y = x * s
        slope = s + x * ds * (1.5957691216057308 + 0.21406443848415657 * x * x)
    elif KIND == 3:
        y = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        y = tl.where(x < 0.0, 0.0, x)
        slope = 2.0 * y
        y = y * y
    return y, slope


@triton.jit
def cap(x, bound):
    """Soft cap: bound * tanh(x / bound); its slope is 1 - (cap / bound)^2."""
    return bound * tanh(x / bound)


@triton.jit
def place(rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile, of as many tiles as cover [rows, cols].

    All are counted by the first program number, which alone may go beyond 65535.
    """
    across = tl.cdiv(cols, BLOCK)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (program % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, col, (row < rows) & (col < cols)
