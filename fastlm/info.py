"""What is built and what this machine has: the first thing to read, and to send with a report."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from fastlm import _ext, ops
from fastlm._version import __version__
from fastlm.memory import allocator
from fastlm.ops import _registry
from fastlm.ops._measured import processor


class Info(dict[str, Any]):
    """The facts by name; printed as a table."""

    def __repr__(self) -> str:
        lines = []
        for name, value in self.items():
            if isinstance(value, dict):
                lines.append(f"{name}:")
                width = max(map(len, value), default=0)
                lines += [f"  {k:<{width}}  {_text(v)}" for k, v in value.items()]
            else:
                lines.append(f"{name + ':':<22}{_text(value)}")
        return "\n".join(lines)

    __str__ = __repr__


def info() -> Info:
    """Version, native kernels, instruction set, threads, allocator, GPU, and backends per operator.

    Returns:
        A dictionary of plain values (JSON can hold it) that prints as a table.

    >>> fastlm.info()["version"] == fastlm.__version__
    True
    """
    facts = Info()
    facts["version"] = __version__
    facts["python"] = platform.python_version()
    facts["torch"] = torch.__version__
    facts["native kernels"] = _native()
    facts["processor"] = processor()
    if _ext.native is not None:
        facts["instruction set"] = _ext.native.cpu_isa()
        facts["instruction sets"] = list(_ext.native.supported_isas())
    facts["threads"] = torch.get_num_threads()
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    facts["memory allocator"] = allocator()
    facts["CUDA kernels"] = "loaded" if _ext.cuda_loaded else f"none: {_ext.cuda_error}"
    facts["GPUs"] = _gpus()
    if _registry.forced() is not None:
        facts["forced backend"] = _registry.forced()
    facts["CPU backends"] = {stem: ops.implementations(stem, "cpu") for stem in _registry.stems()}
    facts["CUDA backends"] = {stem: ops.implementations(stem, "cuda") for stem in _registry.stems()}
    return facts


def _native() -> str:
    if _ext.native is None:
        return f"none: {_ext.native_error}"
    built = _ext.native.build_info()
    return f"built with g++ {built['compiler']} against torch {built['torch']}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        gpus.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return gpus


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
