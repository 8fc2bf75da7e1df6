"""feed_forward in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastlm.reference.activation import activation as act


def feed_forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    w_gate: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """y = act(x w_in^T + b_in) w_out^T + b_out, or with the gate's activation times the input's."""
    hidden = F.linear(x, w_in, b_in)
    if w_gate is None:
        hidden = act(hidden, activation)
    else:
        hidden = act(F.linear(x, w_gate, b_gate), activation) * hidden
    return F.linear(hidden, w_out, b_out)
