"""activation and gated_activation in plain PyTorch: oracle, fallback and baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def activation(x: Tensor, kind: str) -> Tensor:
    """y = act(x)."""
    if kind == "silu":
        return F.silu(x)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "relu":
        return F.relu(x)
    if kind == "relu2":
        return F.relu(x).square()
    raise ValueError(f"activation: unknown kind {kind!r}")


def gated_activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """y = act(gate) * up; without `up`, `gate` holds both, side by side in the last dimension."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return activation(gate, kind) * up
