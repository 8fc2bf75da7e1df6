"""A linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops


class Linear(torch.nn.Linear):
    """torch.nn.Linear on `fastlm.ops.linear`: same arguments, same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """y = input weight^T + bias, [..., in_features] -> [..., out_features]."""
        return ops.linear(input, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """torch.nn.Linear's initial values; none on the meta device, where they cost seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()
