"""Kernels that are launched at little cost: compiled forms are kept by what they depend on.

Triton binds, specialises and looks up every argument of every launch in Python (5 to 8 us). Here a
launch like an earlier one is a single lookup (same device, types, alignment of the pointers, same
numbers, same constants) and a call of Triton's launcher in C: about 1 us where fastlm's native
module is there (csrc/torch/triton_launch_python.h), 2.6 us in Python.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastlm import _ext, settings
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
# what a profiler hangs into launches: lists, empty where there is none
_HOOKS = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
_ENTER, _EXIT = (getattr(chain, "calls", []) for chain in _HOOKS)
# On AMD Triton compiles other code for tensors that lie within 2 GB (32-bit offsets)
_SIZED = bool(torch.version.hip)
_NEAR = 2**31 - 1

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for, while recording."""

    kernel: Kernel
    tensors: tuple[torch.dtype | None, ...]
    scalars: tuple[Any, ...]
    config: Config
    constants: dict[str, Any]


_recorded: list[list[Launch]] = []  # who is recording: at most one


class Plan(NamedTuple):
    """How a compiled kernel is launched: `call(*grid, stream, *middle, *arguments)`.

    The arguments are the addresses of the tensors and `rest`, in one tuple where `nested`.
    """

    call: Callable[..., Any]
    middle: tuple[Any, ...]
    rest: tuple[Any, ...]
    nested: bool
    slowly: Callable[..., Any]  # Triton's own launch, (grid, stream, arguments)

    def launch(self, grid: Grid, stream: int, pointers: list[int]) -> None:
        arguments = (*pointers, *self.rest)
        if _ENTER or _EXIT:
            self.slowly(*grid, stream, arguments)
        elif self.nested:
            self.call(*grid, stream, *self.middle, arguments)
        else:
            self.call(*grid, stream, *self.middle, *arguments)


class Kernel:
    """A Triton function whose parameters are tensors, then numbers, then `tl.constexpr`s."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function = triton.jit(function, **options)
        self.name = function.__name__
        names = function.__annotations__
        self.constants = [name for name, kind in names.items() if "constexpr" in str(kind)]
        self._kept: dict[tuple[Any, ...], Plan] = {}

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
        if _recorded or not _CALLABLE:
            return self._plainly(grid, tensors, scalars, config, constants)
        # one loop for all that tensors say, None as the address 0
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
        aligned: Any = bits & 15 == 0 or tuple([p & 15 for p in pointers])
        if _SIZED:
            sizes = [0 if t is None else t.untyped_storage().nbytes() for t in tensors]
            aligned = (aligned, *[size <= _NEAR for size in sizes])
        device = tensors[0].get_device()  # type: ignore[union-attr]
        key = (device, aligned, scalars, config, *types, *constants.values())
        if device != _current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, scalars, config, **constants)
        plan = self._kept.get(key)
        if plan is None:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            plan = self._kept[key] = self.plan(tensors, scalars, config, constants)
        plan.launch(grid, _current_stream(device), pointers)

    def quick(self) -> Callable[..., None]:
        """This kernel as a function in C, where the native module and PyTorch have what it needs.

        What is no plain launch on the current device it hands on to this object.
        """
        exchange = hasattr(Tensor, "__dlpack_c_exchange_api__")
        if not _CALLABLE or _SIZED or _ext.native is None or not exchange:
            return self
        watched = (_ENTER, _EXIT, _recorded)
        names = tuple(map(sys.intern, self.constants))
        launch: Callable[..., None] = _ext.native.triton_launcher(
            Tensor, names, watched, _current_device, _current_stream, self.plan, self, _MOST
        )
        return launch

    def plan(
        self,
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        config: Config,
        constants: dict[str, Any],
    ) -> Plan:
        """Compiles for arguments like these."""
        self._check(constants)
        options = {"num_warps": config.warps, "num_stages": config.stages}
        # Triton's own cache: one compilation for all numbers that are specialised alike
        made = self.function.warmup(*tensors, *scalars, grid=(1, 1, 1), **constants, **options)
        return planned(made, (*scalars, *constants.values()))

    def _plainly(
        self,
        grid: Grid,
        tensors: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        config: Config,
        constants: dict[str, Any],
    ) -> None:
        self._check(constants)
        if _recorded:
            types = tuple(None if t is None else t.dtype for t in tensors)
            _recorded[-1].append(Launch(self, types, scalars, config, constants))
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


def planned(compiled: Any, rest: tuple[Any, ...]) -> Plan:
    """A compiled kernel's launch with the arguments after the tensors bound, in few calls.

    Triton's own way prepares metadata for hooks, though there be none, and asks for scratch memory.
    For NVIDIA's launcher of Triton 3.6 and 3.7 without either, its C function is called; any other
    one through `CompiledKernel[grid]`.
    """

    def slowly(x: int, y: int, z: int, stream: int, arguments: tuple[Any, ...]) -> None:
        compiled[x, y, z](*arguments, stream=stream)

    version = triton.__version__.split(".")[:2]
    known = not torch.version.hip and version in (["3", "6"], ["3", "7"])
    run: Any = compiled.run if known else None
    if type(run).__name__ != "CudaLauncher" or run.global_scratch_size or run.profile_scratch_size:
        return Plan(slowly, (), rest, True, slowly)
    packed = compiled.packed_metadata
    before = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    if version == ["3", "6"]:  # scratch memory, metadata, metadata for hooks, hooks
        return Plan(
            run.launch, (*before, None, None, packed, None, None, None), rest, False, slowly
        )
    # metadata, metadata for hooks, hooks, scratch memory
    after = (packed, None, None, None, None, None, run.arg_annotations, run.kernel_signature)
    return Plan(run.launch, (*before, *after), rest, True, slowly)


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorates a kernel; options are those of `triton.jit`, such as do_not_specialize."""
    return lambda function: Kernel(function, **options).quick()


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Collects launches instead of making them, chosen as for an architecture of `_configs`.

    The functions that launch can then be called on tensors of the device "meta".
    """
    launches: list[Launch] = []
    _recorded.append(launches)
    try:
        with _configs.assume(architecture):
            yield launches
    finally:
        _recorded.pop()
