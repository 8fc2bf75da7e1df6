"""rms_norm on Triton; the kernels are in _norm.py."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastlm.triton import _norm


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """The operator of this name."""
    return _norm.forward(x, None, weight, None, eps, offset, False)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor | None]:
    """The operator of this name."""
    return _norm.forward(x, residual, weight, None, eps, offset, False)


def rms_norm_backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """The operator of this name."""
    return _norm.backward(grad, grad_summed, x, weight, False, eps, offset, False)[:2]


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    for cols in (128, 2048, 4096, 4099, 8192, 16384, 32768):
        x = torch.empty(8192, cols, dtype=torch.bfloat16, device="meta")
        w = x[0]
        yield f"rms_norm {cols}", partial(add_rms_norm, x, x, w, 1e-6, 0.0)
        yield f"rms_norm_backward {cols}", partial(rms_norm_backward, x, x, x, w, 1e-6, 0.0)
