"""A run of somebody else's model in float64, all of it.

Models cast on purpose: norms and softmax to fp32, rotation tables to the hidden states' dtype. In a
copy whose parameters are float64 those casts would throw the added digits away again, and the run
would be no oracle. Inside `float64()` every floating-point dtype that is asked for is float64, and
PyTorch's attention is the plain one: its flash kernel for the CPU is wrong, in float64 too, in the
gradients of rows that a finite mask hides whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = frozenset({torch.float32, torch.bfloat16, torch.float16})
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return (Tensor.double if func in _CASTS else func)(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Inside the block no tensor is made in or cast to a narrower floating-point type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Mode(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_default_dtype(before)


def doubled(value: Any) -> Any:
    """A nest of tensors with the floating-point ones in float64."""
    return tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value
    )
