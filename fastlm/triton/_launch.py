"""Kernels that are launched at little cost: compiled forms are kept by what they depend on.

Triton binds, specialises and looks up every argument of every launch in Python (5 to 8 us). Here a
launch like an earlier one is a single lookup: same device, types, alignment of the pointers, same
numbers, same constants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastlm import settings
from fastlm.triton import _configs
from fastlm.triton._configs import Config

INTERPRETED = settings.interpreted()
# Whether a compiled kernel can be called with its arguments (Triton 3.6 to 3.9); else Triton's own
# launch does everything.
_CALLABLE = hasattr(triton.compiler.CompiledKernel, "__getitem__") and not INTERPRETED
_MOST = 4096  # kept launches of a kernel; numbers that change with every call would fill memory

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for, while recording."""

    kernel: Kernel
    tensors: tuple[torch.dtype | None, ...]
    scalars: tuple[Any, ...]
    config: Config
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


class Kernel:
    """A Triton function whose parameters are tensors, then numbers, then `tl.constexpr`s."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function = triton.jit(function, **options)
        self.name = function.__name__
        names = function.__annotations__
        self.constants = [name for name, kind in names.items() if "constexpr" in str(kind)]
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: Grid,
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        config: Config,
        **constants: Any,
    ) -> None:
        """Launches on the current stream of the device of the first tensor.

        `constants` are all constexprs in the order of the parameters; a tensor may be None, which
        the kernel sees as the constant None. An empty grid launches nothing.
        """
        if 0 in grid:
            return
        if _recorded is not None or not _CALLABLE:
            return self._plainly(grid, tensors, scalars, config, constants)
        pointers = [t if t is None else t.data_ptr() for t in tensors]
        bits = 0
        for p in pointers:
            if p:
                bits |= p
        aligned = bits & 15 == 0 or tuple([p is None or p & 15 for p in pointers])
        device = tensors[0].get_device()  # type: ignore[union-attr]
        driver = triton.runtime.driver.active
        if device != driver.get_current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, scalars, config, **constants)
        types = [t if t is None else t.dtype for t in tensors]
        key = (device, aligned, scalars, config, *types, *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compile(key, tensors, scalars, config, constants)
        stream = driver.get_current_stream(device)
        compiled[grid](*pointers, *scalars, *constants.values(), stream=stream)

    def _compile(
        self,
        key: tuple[Any, ...],
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        config: Config,
        constants: dict[str, Any],
    ) -> Any:
        self._check(constants)
        if len(self._compiled) >= _MOST:
            self._compiled.clear()
        options = {"num_warps": config.warps, "num_stages": config.stages}
        # Triton's own cache: one compilation for all numbers that are specialised alike
        made = self.function.warmup(*tensors, *scalars, grid=(1, 1, 1), **constants, **options)
        self._compiled[key] = made
        return made

    def _plainly(
        self,
        grid: Grid,
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        config: Config,
        constants: dict[str, Any],
    ) -> None:
        self._check(constants)
        if _recorded is not None:
            types = tuple(None if t is None else t.dtype for t in tensors)
            _recorded.append(Launch(self, types, scalars, config, constants))
            return
        options = {} if INTERPRETED else {"num_warps": config.warps, "num_stages": config.stages}
        device = tensors[0].device  # type: ignore[union-attr]
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.function[grid](*tensors, *scalars, **constants, **options)

    def _check(self, constants: dict[str, Any]) -> None:
        if list(constants) != self.constants:
            raise TypeError(
                f"{self.name}: constants must be {', '.join(self.constants)} in this order, "
                f"got {', '.join(constants)}"
            )


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates a kernel; options are those of `triton.jit`, such as do_not_specialize."""
    return lambda function: Kernel(function, **options)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Collects launches instead of making them, chosen as for an architecture of `_configs`.

    The functions that launch can then be called on tensors of the device "meta".
    """
    global _recorded
    launches: list[Launch] = []
    _recorded = launches
    try:
        with _configs.assume(architecture):
            yield launches
    finally:
        _recorded = None
