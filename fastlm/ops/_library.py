"""The registered operators: schemas and shape functions in Python, kernels in C++, CUDA, Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastlm import _ext  # noqa: F401  (importing it loads the kernels)

_library = torch.library.Library("fastlm", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `fastlm::<schema>` with its shape function; returns the callable overload.

    The operators are private and carry no autograd: users call the functions of fastlm.ops.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)
    return getattr(torch.ops.fastlm, name).default


def direct(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator without its Python call layer (0.3 us), which the compiler cannot trace."""
    return getattr(operator, "_op", operator)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
