"""fastlm: fused kernels for decoder language models, on CPU and GPU."""

from fastlm import ops
from fastlm._version import __version__

__all__ = ["__version__", "ops"]
