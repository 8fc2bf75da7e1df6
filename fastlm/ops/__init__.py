"""The operators. Each is a plain function of tensors; see its docstring for the equation."""

from fastlm.ops._registry import implementations, use_backend
from fastlm.ops.activation import activation, gated_activation
from fastlm.ops.attention import attention
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.decode_attention import decode_attention
from fastlm.ops.feed_forward import feed_forward
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.quantized_linear import quantize_weight, quantized_linear
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rope import rope, rope_
from fastlm.ops.rope_append import rope_append
from fastlm.ops.sample import sample
from fastlm.reference import QuantizedWeight

__all__ = [
    "QuantizedWeight",
    "activation",
    "attention",
    "cross_entropy",
    "decode_attention",
    "feed_forward",
    "gated_activation",
    "implementations",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rope_",
    "rope_append",
    "sample",
    "use_backend",
]
