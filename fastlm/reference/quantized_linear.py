from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.reference.quantized_weight import QuantizedWeight


def quantize_weight(
    w: Tensor, bits: int = 8, group_size: int = 32, symmetric: bool = True
) -> QuantizedWeight:
    """Rounds each group to the integers of its scale (and minimum), bit for bit as GGUF does."""
    groups = w.detach().float().unflatten(1, (w.shape[1] // group_size, group_size))
    minimum = None
    if bits == 8:
        scale = groups.abs().amax(-1, keepdim=True) / 127
    elif symmetric:
        # the value farthest from zero becomes -8, so its sign goes into the scale
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    else:
        minimum, most = groups.aminmax(dim=-1, keepdim=True)
        scale = (most - minimum) / 15
    # the integers are those of the scale before it is rounded to fp16
    per_step = torch.where(scale == 0, 0.0, 1 / scale)
    per_step = torch.where(per_step.isinf(), 0.0, per_step)  # a scale that is 0 in fp16
    if bits == 8:
        q = groups * per_step
        whole = q.abs().floor()
        whole = whole + (2 * (q.abs() - whole)).floor()  # halves away from zero
        values = whole.copysign(q).to(torch.int8).flatten(1)
    else:
        q = (groups * per_step + 8.5) if minimum is None else (groups - minimum) * per_step + 0.5
        q = q.clamp(0, 15).to(torch.uint8)
        half = group_size // 2
        values = (q[..., :half] | q[..., half:] << 4).flatten(1)
    return QuantizedWeight(
        values,
        scale.half().squeeze(-1),
        None if minimum is None else minimum.half().squeeze(-1),
        bits,
        group_size,
    )


def quantized_linear(
    x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None, activations: str = "exact"
) -> Tensor:
    """y = x w^T + bias with w as the integers express it; products and sums in fp32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(wide)
    if activations == "int8":
        x_wide = x_wide + (_rounded(x_wide) - x_wide).detach()  # its gradient is that of x
    bias = None if bias is None else bias.to(wide)
    return F.linear(x_wide, qweight.dequantize(wide), bias).to(x.dtype)


def _rounded(x: Tensor) -> Tensor:
    """x to 127 steps of the largest of 32 neighbours."""
    blocks = x.unflatten(-1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True)
    per_step = torch.where(most > 1e-30, 127 / most, 0.0 * most)
    return ((blocks * per_step).round() * (most / 127)).flatten(-2)
