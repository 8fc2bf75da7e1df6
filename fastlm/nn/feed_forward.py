"""The feed-forward block of a decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.nn.linear import Linear


class FeedForward(torch.nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated, in one operator.

    Args:
        hidden: width of x and of the result.
        intermediate: width between the projections.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2".
        gated: SwiGLU and its relatives.
        bias: whether the projections have one.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: str = "gelu",
        *,
        gated: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = Linear(hidden, intermediate, bias, device, dtype) if gated else None
        self.up = Linear(hidden, intermediate, bias, device, dtype)
        self.down = Linear(intermediate, hidden, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        layers = self.up, self.down, self.gate
        # a quantized layer, or one with an adapter, computes its own product
        if all(layer is None or isinstance(layer, torch.nn.Linear) for layer in layers):
            return ops.feed_forward(x, **self.arguments())
        if self.gate is None:
            return self.down(ops.activation(self.up(x), self.activation))
        return self.down(ops.gated_activation(self.gate(x), self.up(x), self.activation))

    def arguments(self) -> dict[str, Any]:
        """What `fastlm.ops.feed_forward` takes beside x."""
        up, down, gate = self.up, self.down, self.gate
        return {
            "w_in": up.weight,
            "w_out": down.weight,
            "w_gate": None if gate is None else gate.weight,
            "b_in": up.bias,
            "b_out": down.bias,
            "b_gate": None if gate is None else gate.bias,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
