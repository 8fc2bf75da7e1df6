"""The registered operators: schemas and shape functions in Python, kernels in C++, CUDA, Triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from fastlm import _ext, settings  # noqa: F401  (importing _ext loads the kernels)

_library = torch.library.Library("fastlm", "DEF")
_defined: dict[Any, tuple[str, Callable[..., Any]]] = {}  # operator -> schema, shape function


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `fastlm::<schema>` with its shape function; returns the callable overload.

    The operators are private and carry no autograd: users call the functions of fastlm.ops.
    """
    name = schema[: schema.index("(")]
    fake = _on_one_device(name, fake)
    _library.define(schema)
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fastlm, name).default
    _defined[operator] = schema, fake
    return operator


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The shape function, which also runs where one of the tensors alone is a meta tensor.

    What it returns would then pass for a result: RuntimeError, for the facade to explain.
    """

    def run(*args: Any) -> Any:
        made = fake(*args)
        devices = {x.device for x in args if isinstance(x, torch.Tensor)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"{name}: tensors must be on one device, got {found}")
        return made

    return run


def by_backend(stem: str, operator: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The operator by the name of the backend, for rows that list "triton".

    One overload holds the native kernels, told apart by the device of the tensors. Triton's serve
    the same device as the CUDA kernels, so they are an overload of their own, `fastlm::X.triton`:
    the function X of fastlm/triton/<stem>.py, imported with the first call.
    """
    schema, fake = _defined[operator]
    name, open_bracket, rest = schema.partition("(")
    overload = f"{name}.triton"
    _library.define(overload + open_bracket + rest)
    torch.library.register_fake(f"fastlm::{overload}", fake, lib=_library)
    for device in ("CUDA", "CPU") if settings.interpreted() else ("CUDA",):
        _library.impl(overload, _imported_late(stem, name), device)
    triton = getattr(torch.ops.fastlm, name).triton
    return {"cpu": operator, "cuda": operator, "triton": triton}


def _imported_late(stem: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(f"fastlm.triton.{stem}"), name)
        return function(*args)

    return run


def direct(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator without its Python call layer (0.3 us), which the compiler cannot trace."""
    return getattr(operator, "_op", operator)


class Function(torch.autograd.Function):
    """An autograd.Function whose apply is C++ at once: a third less of a small call's forward.

    What is left out refuses functorch's transforms; while one is on, or the compiler traces, it is
    called. Positional arguments only.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device; PyTorch cannot be asked that of the meta device."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def twice() -> bool:
    """Whether a backward function has to record what it does: a second derivative may follow."""
    return torch.is_grad_enabled() and not is_dynamo_compiling()


def again(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    need: Sequence[bool],
    *grads: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The gradients by PyTorch's own operators, so that they can be differentiated again.

    The kernels carry no autograd: what they return would pass for a constant.
    """
    # views, for one input may be made of another, or be the same
    leaves = [None if t is None else t.view_as(t) for t in inputs]
    made = function(*leaves)
    outputs = made if isinstance(made, tuple) else (made,)
    given = [(y, g) for y, g in zip(outputs, grads, strict=False) if g is not None]
    wanted = [t for t, n in zip(leaves, need, strict=False) if n and t is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in given],
            wanted,
            [g for _, g in given],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [
        next(found) if n and t is not None else None for t, n in zip(leaves, need, strict=False)
    ]
