from fastlm.reference.decode_attention import decode_attention
from fastlm.reference.feed_forward import feed_forward
from fastlm.reference.linear import linear
from fastlm.reference.quantized_linear import QuantizedWeight, quantize_weight, quantized_linear
from fastlm.reference.rms_norm import rms_norm
from fastlm.reference.rope import rope, rotated_width

__all__ = [
    "QuantizedWeight",
    "decode_attention",
    "feed_forward",
    "linear",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rotated_width",
]
