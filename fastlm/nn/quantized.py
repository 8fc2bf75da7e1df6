"""A linear layer whose weight is held in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import ops
from fastlm.reference import QuantizedWeight


class QuantizedLinear(torch.nn.Module):
    """y = x w^T + bias with the weight in integers (`fastlm.ops.quantized_linear`).

    The weight's parts are buffers and carry no gradient; scales stay fp16 whatever dtype the model
    is converted to.

    Args:
        qweight: from `fastlm.ops.quantize_weight` or `QuantizedWeight.from_gguf`.
        bias: [N], or None.
        activations: "exact", or "int8" to round x as llama.cpp does: faster, and less accurate.
    """

    values: Tensor
    scale: Tensor
    minimum: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        qweight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        activations: str = "exact",
    ) -> None:
        super().__init__()
        if activations not in ("exact", "int8"):
            raise ValueError(
                f"QuantizedLinear: activations must be 'exact' or 'int8', got {activations!r}"
            )
        if qweight.values.is_cpu:
            qweight = qweight.pack()
        self.bits, self.group_size, self.outputs = qweight[3:]
        self.activations = activations
        self.register_buffer("values", qweight.values)
        self.register_buffer("scale", qweight.scale)
        self.register_buffer("minimum", qweight.minimum)
        own = None if bias is None else torch.nn.Parameter(bias.detach().clone())
        self.register_parameter("bias", own)

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        bits: int = 8,
        group_size: int = 32,
        *,
        symmetric: bool = True,
        activations: str = "exact",
    ) -> QuantizedLinear:
        """A linear layer's weight, quantized as `fastlm.ops.quantize_weight` does."""
        qweight = ops.quantize_weight(linear.weight, bits, group_size, symmetric=symmetric)
        return cls(qweight, linear.bias, activations=activations)

    @property
    def qweight(self) -> QuantizedWeight:
        """The weight's parts together."""
        parts = self.values, self.scale, self.minimum
        return QuantizedWeight(*parts, self.bits, self.group_size, self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        bias = self._parameters["bias"]
        return ops.quantized_linear(x, self.qweight, bias, activations=self.activations)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Follows the model to another device, but keeps the scales fp16."""
        before = self.qweight
        super()._apply(fn, recurse)
        if self.values.device != before.values.device:
            before = before.to(self.values.device)
        self.values, self.scale, self.minimum, *_, self.outputs = before
        return self

    def extra_repr(self) -> str:
        outputs, inputs = self.qweight.shape
        return f"{inputs} -> {outputs}, bits={self.bits}, activations={self.activations}"
