"""The operators as modules, named as in torch.nn where it has the like."""

from fastlm.nn.attention import SelfAttention
from fastlm.nn.feed_forward import FeedForward
from fastlm.nn.linear import Linear
from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.quantized import QuantizedLinear
from fastlm.nn.rope import RotaryTable

__all__ = [
    "CrossEntropyLoss",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryTable",
    "SelfAttention",
]
