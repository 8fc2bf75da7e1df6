from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


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
    act = _ACTIVATIONS[activation]
    hidden = F.linear(x, w_in, b_in)
    hidden = act(hidden) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * hidden
    return F.linear(hidden, w_out, b_out)
