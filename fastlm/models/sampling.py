"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import ops


def sample(
    logits: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The next token of each row: [B, V] -> [B], as `fastlm.ops.sample` draws it.

    One random number per row is taken from the generator, none at temperature 0.
    """
    shape, device = logits.shape[:1], logits.device
    if temperature == 0:
        uniform = torch.zeros(shape, dtype=torch.float64, device=device)
    else:
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    return ops.sample(
        logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
