"""layer_norm on Triton; the kernels are in _norm.py."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastlm.triton import _norm


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The operator of this name."""
    return _norm.forward(x, None, weight, bias, eps, 0.0, True)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The operator of this name."""
    return _norm.forward(x, residual, weight, bias, eps, 0.0, True)


def layer_norm_backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of this name."""
    return _norm.backward(grad, grad_summed, x, weight, bias, eps, 0.0, True)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    for cols in (128, 768, 2048, 4096, 8192, 16384, 32768):
        x = torch.empty(8192, cols, dtype=torch.bfloat16, device="meta")
        w = x[0]
        yield f"layer_norm {cols}", partial(add_layer_norm, x, x, w, w, 1e-6)
        yield f"layer_norm_backward {cols}", partial(layer_norm_backward, x, x, x, w, True, 1e-6)
