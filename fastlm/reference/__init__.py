from fastlm.reference.activation import activation, gated_activation
from fastlm.reference.attention import attention
from fastlm.reference.cross_entropy import cross_entropy
from fastlm.reference.decode_attention import decode_attention
from fastlm.reference.feed_forward import feed_forward
from fastlm.reference.layer_norm import layer_norm
from fastlm.reference.linear import linear
from fastlm.reference.linear_cross_entropy import (
    chunked_linear_cross_entropy,
    linear_cross_entropy,
)
from fastlm.reference.quantized_linear import quantize_weight, quantized_linear
from fastlm.reference.quantized_weight import QuantizedWeight
from fastlm.reference.rms_norm import rms_norm
from fastlm.reference.rope import rope, rope_, rotated_width
from fastlm.reference.rope_append import rope_append
from fastlm.reference.sample import probabilities, sample

__all__ = [
    "QuantizedWeight",
    "activation",
    "attention",
    "chunked_linear_cross_entropy",
    "cross_entropy",
    "decode_attention",
    "feed_forward",
    "gated_activation",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "probabilities",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rope_",
    "rope_append",
    "rotated_width",
    "sample",
]
