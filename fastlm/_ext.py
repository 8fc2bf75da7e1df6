"""Loads the native libraries once and keeps the reason where one is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from fastlm import settings

native: ModuleType | None = None  # fastlm._C, whose import registers the CPU kernels
native_error: str | None = None  # why there is none
native_stems: frozenset[str] = frozenset()  # the operators it has CPU kernels for
cuda_loaded = False  # whether fastlm/_cuda.so registered the CUDA kernels
cuda_error: str | None = None


def _load() -> None:
    global native, native_error, native_stems, cuda_loaded, cuda_error
    try:
        native = importlib.import_module("fastlm._C")
        native_stems = frozenset(native.build_info().get("stems", ()))
        native.cpu_isa()  # an invalid FASTLM_CPU_ISA raises here, not in the first kernel
    except ImportError as error:
        native_error = f"fastlm._C: {error}"
        if not settings.quiet():
            warnings.warn(
                "fastlm has no native kernels here and runs on its PyTorch reference kernels: "
                f"{native_error}. Reinstall where a C++ compiler is present "
                "(FASTLM_REQUIRE_NATIVE=1 makes a failing build an error).",
                RuntimeWarning,
                stacklevel=2,
            )
    library = Path(__file__).with_name("_cuda.so")
    if not library.exists():
        cuda_error = "fastlm was built without CUDA kernels (FASTLM_CUDA=1 builds them)"
        return
    try:
        torch.ops.load_library(str(library))
        cuda_loaded = True
    except OSError as error:
        cuda_error = f"{library.name}: {error}"


@lru_cache
def triton_error() -> str | None:
    """Why Triton's kernels cannot run here, found without importing Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built for another vendor, under another name
        return None
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return f"needs Triton 3.6 or newer, found {version}"
    return None


_load()
