"""Argument checks whose messages name operator, argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, got: object) -> ValueError:
    """The error to raise: `rms_norm: weight must be [4096], got [4095]`."""
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def tensor(op: str, argument: str, value: object) -> torch.Tensor:
    """Checks that a value is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")
    return value


def floating(op: str, argument: str, value: object) -> torch.Tensor:
    """Checks that a value is a tensor of fp32, bf16, fp16 or fp64."""
    x = tensor(op, argument, value)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {argument} must be a floating-point tensor, got {x.dtype}")
    return x


def rank(op: str, argument: str, x: torch.Tensor, *ranks: int) -> None:
    """Checks the number of dimensions."""
    if x.dim() not in ranks:
        wanted = " or ".join(str(r) for r in ranks)
        raise fail(op, argument, f"of rank {wanted}", f"rank {x.dim()} ({list(x.shape)})")


def shape(op: str, argument: str, x: torch.Tensor, expected: Sequence[int]) -> None:
    """Checks an exact shape."""
    if tuple(x.shape) != tuple(expected):
        raise fail(op, argument, str(list(expected)), list(x.shape))


def same_device(op: str, argument: str, x: torch.Tensor, like: torch.Tensor) -> None:
    """Checks that x lies on the device of `like`."""
    if x.device != like.device:
        raise fail(op, argument, f"on {like.device}", x.device)


def same_dtype(op: str, argument: str, x: torch.Tensor, like: torch.Tensor) -> None:
    """Checks that x has the element type of `like`."""
    if x.dtype != like.dtype:
        raise fail(op, argument, str(like.dtype), x.dtype)


def positive(op: str, argument: str, value: float) -> None:
    """Checks that a number is above zero and no infinity."""
    if not 0 < value < math.inf:
        raise fail(op, argument, "positive and finite", value)
