"""Tables of rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class RotaryTable(torch.nn.Module):
    """cos and sin of position * frequency for every position, made once.

    Half-width tables `cos`, `sin` [positions, dim / 2] for `fastlm.ops.rope`. They are fp32
    whatever the model's dtype becomes, and no part of the state dict. Angles are rounded to fp32
    before the cosine is taken, as transformers does: that rounding is part of the trained model.

    Args:
        dim: rotated width of a head, even.
        positions: number of positions.
        theta: base of the frequencies theta^(-2i/dim).
        scaling: None, or a Hugging Face `rope_scaling` mapping of type "linear" or "llama3".
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        positions: int,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"RotaryTable: dim must be positive and even, got {dim}")
        self.dim, self.positions, self.theta = dim, positions, theta
        self.scaling = None if scaling is None else dict(scaling)
        scaled_frequencies(2, theta, scaling)  # an unknown scaling raises here
        for name in ("cos", "sin"):
            table = torch.empty(positions, dim // 2, device=device, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self._fill()

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of some positions: [...] -> cos, sin [..., dim / 2]."""
        return self.cos[positions], self.sin[positions]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        """Follows the model to another device but keeps fp32 and, after to_empty, the values."""
        super()._apply(fn, recurse)
        wide = torch.float64 if self.cos.dtype == torch.float64 else torch.float32
        for name in ("cos", "sin"):
            old = getattr(self, name)
            setattr(self, name, torch.empty_like(old, dtype=wide))
        self._fill()
        return self

    @torch.no_grad()
    def _fill(self) -> None:
        if self.cos.is_meta:
            return
        frequencies = scaled_frequencies(self.dim, self.theta, self.scaling)
        angles = torch.outer(torch.arange(self.positions, dtype=torch.float32), frequencies)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def extra_repr(self) -> str:
        return f"{self.dim}, positions={self.positions}, theta={self.theta}"


def scaled_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """The dim / 2 angles per position, slowest last, in fp32.

    Args:
        dim: rotated width of a head.
        theta: base.
        scaling: None or a mapping with `rope_type` (or `type`) "default", "linear" (`factor`) or
            "llama3" (`factor`, `low_freq_factor`, `high_freq_factor`,
            `original_max_position_embeddings`).

    Raises:
        ValueError: an unknown type, a missing number.
    """
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind = "default" if not scaling else scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" or scaling is None:
        return plain
    if kind == "linear":
        return plain / _number(scaling, "factor")
    if kind == "llama3":
        return _llama3(plain, scaling)
    raise ValueError(
        f"rope scaling: type must be one of default, linear, llama3, got {kind!r} ({dict(scaling)})"
    )


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves stretched by `factor`, short ones kept, a ramp between (Llama 3.1)."""
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    context = _number(scaling, "original_max_position_embeddings")
    if high <= low:
        raise ValueError(
            f"rope scaling: high_freq_factor must be above low_freq_factor, got {high} and {low}"
        )
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > context / low, plain / factor, plain)
    ramp = (context / wavelength - low) / (high - low)
    smooth = (1 - ramp) * stretched / factor + ramp * stretched
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, smooth, stretched)


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"rope scaling: {key} must be a positive number, got {value!r}")
    return value
