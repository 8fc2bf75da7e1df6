"""What a benchmark case is: inputs, implementations, and the work they cannot avoid."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Call = Callable[..., object]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPS = (
    "rms_norm",
    "layer_norm",
    "rope",
    "rope_append",
    "activation",
    "attention",
    "decode_attention",
    "linear",
    "feed_forward",
    "cross_entropy",
    "linear_cross_entropy",
    "quantized_linear",
    "sample",
)


@dataclass(frozen=True)
class Work:
    """One built case: all functions take the inputs; floating-point inputs get a gradient."""

    inputs: tuple[Tensor, ...]
    ours: Call
    eager: Call  # PyTorch's own kernels of the same dtype: the peer and the error's yardstick
    oracle: Call  # the same equation, called with float64
    peers: dict[str, Call] = field(default_factory=dict)  # further peers


@dataclass(frozen=True)
class Case:
    """One row of the table. `build` makes fresh inputs; nothing large exists before."""

    op: str
    shape: str  # "2048x768", as a reader would write it
    dtype: str  # a key of DTYPES
    backward: bool  # forward and backward, or forward only
    bytes: int  # that must move at least once
    flops: int  # multiplications and additions
    build: Callable[[], Work]
    cold: bool = False  # weights come from memory, as in a decoding step: inputs are rotated

    @property
    def direction(self) -> str:
        """How much of the operator runs."""
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def large(self) -> bool:
        """Whether the allocator decides: glibc maps tensors above 32 MiB anew each time."""
        return self.bytes >= 2**26 and not self.cold

    @property
    def id(self) -> str:
        """A name that is unique among all cases and stays the same between versions."""
        return f"{self.op}/{self.shape}/{self.dtype}/{self.direction}"


def load(ops: Iterable[str] = OPS) -> list[Case]:
    """The cases of the named operators, in order."""
    return [
        case for op in ops for case in importlib.import_module(f"{__package__}.ops.test_{op}").CASES
    ]


def size(dtype: str, *shapes: Sequence[int]) -> int:
    """Bytes of tensors of one dtype."""
    return DTYPES[dtype].itemsize * sum(math.prod(shape) for shape in shapes)


def randn(dtype: str, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values from torch's seeded generator."""
    return (torch.randn(shape) * scale).to(DTYPES[dtype])
