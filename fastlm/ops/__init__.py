"""The operators. Each is a plain function of tensors; see its docstring for the equation."""

from fastlm.ops._registry import implementations, use_backend
from fastlm.ops.feed_forward import feed_forward
from fastlm.ops.linear import linear
from fastlm.ops.quantized_linear import QuantizedWeight, quantize_weight, quantized_linear
from fastlm.ops.rms_norm import rms_norm

__all__ = [
    "QuantizedWeight",
    "feed_forward",
    "implementations",
    "linear",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "use_backend",
]
