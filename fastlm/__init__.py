"""fastlm: fused kernels that make decoder language models run fast, on CPU and GPU.

`fastlm.patch(model)` speeds up a Hugging Face model in place; `fastlm.ops` holds the operators,
`fastlm.nn` layers, `fastlm.models` a decoder of its own; `fastlm.info()` and `fastlm.explain(...)`
say what runs and why. Importing fastlm loads the kernels only; everything else is imported at its
first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastlm import ops, settings
from fastlm._version import __version__
from fastlm.explain import explain
from fastlm.info import info
from fastlm.memory import keep_freed_memory

if TYPE_CHECKING:
    from fastlm import hf, models, nn
    from fastlm.hf.patch import Patch, patch
    from fastlm.hf.verify import verify

if settings.keep_memory():
    keep_freed_memory()
if settings.tuning():
    importlib.import_module("fastlm.tune").install()

_MODULES = ("hf", "models", "nn")
_FUNCTIONS = {"Patch": "fastlm.hf", "patch": "fastlm.hf", "verify": "fastlm.hf"}

__all__ = [
    "Patch",
    "__version__",
    "explain",
    "hf",
    "info",
    "keep_freed_memory",
    "models",
    "nn",
    "ops",
    "patch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastlm.{name}")
    else:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
