"""A weight in 8 or 4 bits: its two layouts, and GGUF's blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16  # outputs that lie side by side in the packed layout
# GGUF's types: bytes of a block of 32 values, of which so many are the fp16 scale (and minimum)
GGUF = {"Q8_0": (34, 2), "Q4_0": (18, 2), "Q4_1": (20, 4)}


class QuantizedWeight(NamedTuple):
    """A weight [N, K] in integers of 8 or 4 bits, each run of `group_size` with its own scale.

    8 bits:             w = values * scale
    4 bits:             w = (values - 8) * scale
    4 bits and minimum: w = values * scale + minimum

    By rows, as `quantize_weight` makes it off the CPU and `unpack` gives it back: values are int8
    [N, K] or uint8 [N, K / 2], scale and minimum fp16 [N, K / group_size]. Four-bit values lie two
    to a byte: within a group, byte j holds value j in its low half and value j + group_size / 2 in
    its high half (the order of GGUF's Q4_0 and Q4_1).

    Packed, as the CPU's kernel reads it: 16 outputs side by side, N filled up with zeros. Values
    are int8 [N / 16, K / 4, 16, 4] or uint8 [N / 16, K / 8, 16, 4] whose byte j holds value j in
    its low half and value 4 + j in its high half; scale and minimum [N / 16, K / group_size, 16].
    The packed layout is the same on every processor, and both hold the same integers.
    """

    values: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int
    group_size: int
    outputs: int | None = None  # N of a packed weight

    @property
    def packed(self) -> bool:
        """Whether the values lie as the CPU's kernel reads them."""
        return self.outputs is not None

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight that was quantized."""
        outputs = self.values.shape[0] if self.outputs is None else self.outputs
        return outputs, self.scale.shape[1] * self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the integers stand for."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        _, scale, minimum, *_ = by_rows = self.unpack()
        q = by_rows.integers().to(wide)
        if self.bits == 4 and minimum is None:
            q = q - 8
        w = q * scale.to(wide)[..., None]
        if minimum is not None:
            w = w + minimum.to(wide)[..., None]
        return w.flatten(1).to(dtype)

    def integers(self) -> Tensor:
        """The stored integers [N, K / group_size, group_size] of a weight by rows."""
        bytes_ = self.group_size if self.bits == 8 else self.group_size // 2
        groups = self.values.unflatten(1, (self.scale.shape[1], bytes_))
        return groups if self.bits == 8 else torch.cat([groups & 15, groups >> 4], -1)

    def pack(self) -> QuantizedWeight:
        """The same weight packed; itself where it is, is empty, or in groups not of 32 n values."""
        outputs, width = self.shape
        if self.packed or self.group_size % 32 or width == 0:
            return self
        fill = (0, 0, 0, -outputs % PANEL)
        if self.bits == 8:
            quads = self.values.contiguous().view(torch.int32)
        else:
            low, high = self.integers().view(outputs, width // 8, 2, 4).unbind(2)
            quads = (low | high << 4).flatten(1).view(torch.int32)
        panels = -(-outputs // PANEL)

        def side_by_side(t: Tensor) -> Tensor:
            return _swap(F.pad(t, fill).view(panels, PANEL, t.shape[1]))

        return QuantizedWeight(
            side_by_side(quads)[..., None].view(self.values.dtype),
            side_by_side(self.scale),
            None if self.minimum is None else side_by_side(self.minimum),
            self.bits,
            self.group_size,
            outputs,
        )

    def unpack(self) -> QuantizedWeight:
        """The same weight by rows; itself where it is not packed."""
        if self.outputs is None:
            return self
        outputs, width = self.shape

        def rows(t: Tensor) -> Tensor:
            return _swap(t).flatten(0, 1)[:outputs]

        values = rows(self.values.view(torch.int32)[..., 0]).contiguous().view(self.values.dtype)
        if self.bits == 4:
            quads = values.view(outputs, width // 8, 1, 4)
            groups = (outputs, width // self.group_size, 2, self.group_size // 2)
            q = torch.cat([quads & 15, quads >> 4], 2).view(groups)
            values = (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)
        minimum = None if self.minimum is None else rows(self.minimum)
        return QuantizedWeight(values, rows(self.scale), minimum, self.bits, self.group_size)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device: packed on a CPU, by rows elsewhere."""
        here = self.pack() if torch.device(device).type == "cpu" else self.unpack()
        return here._replace(
            values=here.values.to(device),
            scale=here.scale.to(device),
            minimum=None if here.minimum is None else here.minimum.to(device),
        )

    @classmethod
    def from_gguf(cls, blocks: Tensor, kind: str) -> QuantizedWeight:
        """A weight by rows of GGUF's blocks, integers and scales as they are.

        Args:
            blocks: uint8 [N, bytes of a row], as the file holds the tensor.
            kind: "Q8_0", "Q4_0" or "Q4_1".

        Raises:
            ValueError: another kind, or rows that are no whole blocks.
        """
        if kind not in GGUF:
            raise ValueError(f"from_gguf: kind must be one of {', '.join(GGUF)}, got {kind!r}")
        size, head = GGUF[kind]
        if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % size:
            got = f"{blocks.dtype} {list(blocks.shape)}"
            raise ValueError(
                f"from_gguf: blocks must be uint8 [N, a multiple of {size}], got {got}"
            )
        parts = blocks.unflatten(1, (-1, size))
        steps = parts[..., :head].contiguous().view(torch.float16)
        values = parts[..., head:].flatten(1)
        return cls(
            values.view(torch.int8) if kind == "Q8_0" else values,
            steps[..., 0].contiguous(),
            steps[..., 1].contiguous() if kind == "Q4_1" else None,
            8 if kind == "Q8_0" else 4,
            32,
        )


def _swap(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous()
