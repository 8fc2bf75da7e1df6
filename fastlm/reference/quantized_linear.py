from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class QuantizedWeight(NamedTuple):
    """A weight [N, K] in integers of 8 or 4 bits, each run of `group_size` with its own scale.

    8 bits:             w = values * scale
    4 bits:             w = (values - 8) * scale
    4 bits and minimum: w = values * scale + minimum

    Four-bit values lie two to a byte: within a group, byte j holds value j in its low half and
    value j + group_size / 2 in its high half (the order of GGUF's Q4_0 and Q4_1).
    """

    values: Tensor  # int8 [N, K], or uint8 [N, K / 2]
    scale: Tensor  # fp16 [N, K / group_size]
    minimum: Tensor | None  # like scale, or None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight that was quantized."""
        return self.values.shape[0], self.scale.shape[1] * self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the integers stand for."""
        rows, groups = self.scale.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.bits == 8:
            q = self.values.view(rows, groups, self.group_size).to(wide)
        else:
            packed = self.values.view(rows, groups, self.group_size // 2)
            q = torch.cat([packed & 15, packed >> 4], -1).to(wide)
            if self.minimum is None:
                q = q - 8
        w = q * self.scale.to(wide)[..., None]
        if self.minimum is not None:
            w = w + self.minimum.to(wide)[..., None]
        return w.flatten(1).to(dtype)


def quantize_weight(
    w: Tensor, bits: int = 8, group_size: int = 32, symmetric: bool = True
) -> QuantizedWeight:
    """Rounds each group to the nearest of the integers its scale (and minimum) can express."""
    groups = w.detach().float().unflatten(1, (-1, group_size))
    minimum = None
    if bits == 8:
        scale = groups.abs().amax(-1, keepdim=True) / 127
        low, high, zero = -127, 127, 0
    elif symmetric:
        # the value farthest from zero becomes -8, so its sign goes into the scale
        farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale = farthest / -8
        low, high, zero = 0, 15, 8
    else:
        least, most = groups.aminmax(dim=-1, keepdim=True)
        minimum = least.half()
        scale = (most - minimum.float()) / 15
        low, high, zero = 0, 15, 0
    scale = scale.half()
    step = scale.float()
    origin = 0.0 if minimum is None else minimum.float()
    q = torch.where(step == 0, 0.0, (groups - origin) / torch.where(step == 0, 1.0, step))
    q = (q.round() + zero).clamp(low, high)
    if bits == 8:
        values = q.to(torch.int8).flatten(1)
    else:
        half = group_size // 2
        q = q.to(torch.uint8)
        values = (q[..., :half] | q[..., half:] << 4).flatten(1)
    return QuantizedWeight(
        values,
        scale.squeeze(-1),
        None if minimum is None else minimum.squeeze(-1),
        bits,
        group_size,
    )


def quantized_linear(x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x w^T + bias with w as the integers express it; products and sums in fp32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(wide)
    return F.linear(x.to(wide), qweight.dequantize(wide), bias).to(x.dtype)
