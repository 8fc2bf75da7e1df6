"""Kernels that are launched at little cost: compiled forms are kept by what they depend on.

Triton binds, specialises and looks up every argument of every launch in Python (5 to 8 us). Here a
launch like an earlier one is a single lookup (same device, types, alignment of the pointers, same
numbers, same constants) and a call of Triton's launcher in C.
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

# what PyTorch built for a GPU has, without the Python around it
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: 0
)
# what a profiler hangs into launches
_HOOKS = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
_ENTER, _EXIT = (getattr(chain, "calls", ()) for chain in _HOOKS)

Grid = tuple[int, int, int]
Launcher = Callable[[Grid, int, list[int]], None]  # grid, stream, addresses of the tensors


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
        self._kept: dict[tuple[Any, ...], Launcher] = {}

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
        # every launch comes through here: one loop for all that tensors say, None as the address 0
        pointers: list[int] = []
        types: list[torch.dtype | None] = []
        bits = 0
        for t in tensors:
            if t is None:
                pointers.append(0)
                types.append(None)
            else:
                address = t.data_ptr()
                bits |= address
                pointers.append(address)
                types.append(t.dtype)
        aligned = bits & 15 == 0 or tuple([p & 15 for p in pointers])
        device = tensors[0].get_device()  # type: ignore[union-attr]
        key = (device, aligned, scalars, config, *types, *constants.values())
        if device != _current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, scalars, config, **constants)
        go = self._kept.get(key)
        if go is None:
            go = self._compile(key, tensors, scalars, config, constants)
        go(grid, _current_stream(device), pointers)

    def _compile(
        self,
        key: tuple[Any, ...],
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        config: Config,
        constants: dict[str, Any],
    ) -> Launcher:
        self._check(constants)
        if len(self._kept) >= _MOST:
            self._kept.clear()
        options = {"num_warps": config.warps, "num_stages": config.stages}
        # Triton's own cache: one compilation for all numbers that are specialised alike
        made = self.function.warmup(*tensors, *scalars, grid=(1, 1, 1), **constants, **options)
        go = launcher(made, (*scalars, *constants.values()))
        self._kept[key] = go
        return go

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


def launcher(compiled: Any, rest: tuple[Any, ...]) -> Launcher:
    """A compiled kernel's launch with the arguments after the tensors bound, in few calls.

    Triton's own way prepares metadata for hooks, though there be none, and asks for scratch memory.
    For NVIDIA's launcher of Triton 3.6 and 3.7 without either, its C function is called; any other
    one through `CompiledKernel[grid]`.
    """

    def slowly(grid: Grid, stream: int, pointers: list[int]) -> None:
        compiled[grid](*pointers, *rest, stream=stream)

    version = triton.__version__.split(".")[:2]
    if torch.version.hip or version not in (["3", "6"], ["3", "7"]):
        return slowly
    run = compiled.run
    if type(run).__name__ != "CudaLauncher" or run.global_scratch_size or run.profile_scratch_size:
        return slowly
    launch, function, packed = run.launch, compiled.function, compiled.packed_metadata
    cooperative, dependent = run.launch_cooperative_grid, run.launch_pdl

    old = version == ["3", "6"]
    annotations, signature = (None, None) if old else (run.arg_annotations, run.kernel_signature)

    def quickly(grid: Grid, stream: int, pointers: list[int]) -> None:
        if _ENTER or _EXIT:
            return slowly(grid, stream, pointers)
        launch(
            *grid, stream, function, cooperative, dependent, packed, None, None, None, None, None,
            annotations, signature, (*pointers, *rest),
        )  # fmt: skip

    def quickly_36(grid: Grid, stream: int, pointers: list[int]) -> None:
        if _ENTER or _EXIT:
            return slowly(grid, stream, pointers)
        launch(
            *grid, stream, function, cooperative, dependent, None, None, packed, None, None, None,
            *pointers, *rest,
        )  # fmt: skip

    return quickly_36 if old else quickly


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
