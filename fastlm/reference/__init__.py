from fastlm.reference.feed_forward import feed_forward
from fastlm.reference.linear import linear
from fastlm.reference.quantized_linear import QuantizedWeight, quantize_weight, quantized_linear
from fastlm.reference.rms_norm import rms_norm

__all__ = [
    "QuantizedWeight",
    "feed_forward",
    "linear",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
]
