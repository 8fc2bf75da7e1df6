"""The operators. Each is a plain function of tensors; see its docstring for the equation."""

from fastlm.ops._registry import implementations, use_backend
from fastlm.ops.rms_norm import rms_norm

__all__ = ["implementations", "rms_norm", "use_backend"]
