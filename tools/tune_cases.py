"""What tools/tune.py times for each table of fastlm/triton/_configs.py, and how it is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops, reference

Inputs = list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """One table's kernel at work in its operator.

    `make(size, small)` gives tensors on the CPU for a size of the table: as people use them, or
    small, to be checked. `vary` are the numbers of a tile that the kernel takes from the table.
    """

    call: Callable[..., Any]
    baseline: Callable[..., Any]  # PyTorch's own
    oracle: Callable[..., Any]  # for float64
    make: Callable[[int, bool], Inputs]
    vary: tuple[int, ...] = (0,)
    gradients: bool = False
    timed: str = "forward"  # or "backward"
    dtype: torch.dtype | None = None  # instead of the one asked for
    typical: int = 4096  # size that stands for a row without a bound, where it is the only one


def _rows(size: int, small: bool) -> Inputs:
    count = 9 if small else max(1, 2**25 // size)
    return [torch.randn(count, size), torch.randn(size)]


def _heads(size: int, small: bool) -> Inputs:
    tokens = 40 if small else 8192
    return [
        torch.randn(1, tokens, n, size).transpose(1, 2)
        for n in ((4, 2, 2) if small else (32, 8, 8))
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, causal=True)


def _attend_there(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v, causal=True)


def _attend_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _attention(timed: str, dtype: torch.dtype | None = None) -> Case:
    every = _attend, _attend_torch, _attend_there
    return Case(*every, _heads, (0, 1), timed == "backward", timed, dtype)


def _cache(size: int, small: bool) -> Inputs:
    batch, keys = (2, 40) if small else (32, 4096)
    caches = [torch.randn(batch, 8, keys, size) for _ in range(2)]
    return [torch.randn(batch, 32, 1, size), *caches]


def _decode(where: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: where.decode_attention(q, k, v, k.shape[2])


def _turned(size: int, small: bool) -> Inputs:
    tokens, (q, k) = (5, (4, 2)) if small else (4096, (32, 8))
    angles = torch.randn(tokens, 128) * 3
    heads = [torch.randn(2, tokens, n, 128).transpose(1, 2) for n in (q, k)]
    return [*heads, angles.cos(), angles.sin()]


def _logits(count: int) -> Callable[[int, bool], Inputs]:
    def make(size: int, small: bool) -> Inputs:
        return [torch.randn(9 if small else count, size) * 3]

    return make


def _targets(x: Tensor, classes: int) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) * 7919 % classes


def _loss(where: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: where.cross_entropy(x, _targets(x, x.shape[-1]))


def _linear_loss(where: Any) -> Callable[..., Tensor]:
    return lambda x, w: where.linear_cross_entropy(x, w, _targets(x, w.shape[0]))


def _vocabulary(size: int, small: bool) -> Inputs:
    rows, classes, width = (40, 101, 16) if small else (8192, 128256, 4096)
    return [torch.randn(rows, width), torch.randn(classes, width) / width**0.5]


def _mlp(rows: int) -> Callable[[int, bool], Inputs]:
    def make(size: int, small: bool) -> Inputs:
        hidden, count = (48, min(rows, 100)) if small else (size * 8 // 3 // 16 * 16, rows)
        gates = [torch.randn(hidden, size) / size**0.5 for _ in range(2)]
        return [
            torch.randn(count, size),
            gates[0],
            torch.randn(size, hidden) / hidden**0.5,
            gates[1],
        ]

    return make


def _forward(where: Any) -> Callable[..., Tensor]:
    return lambda x, a, b, gate: where.feed_forward(x, a, b, w_gate=gate, activation="silu")


def _feed_forward(rows: int, kept: bool = False, dtype: torch.dtype | None = None) -> Case:
    every = _forward(ops), _forward(reference), _forward(reference)
    return Case(*every, _mlp(rows), (0, 1, 2), kept, dtype=dtype)


def _quantized(rows: int | None) -> Case:
    def make(size: int, small: bool) -> Inputs:
        width = 128 if small else 4096
        return [torch.randn(rows or size, width), torch.randn(40 if small else 4096, width)]

    # the same weight for every call of one case: quantising is not what is timed
    made: dict[int, Any] = {}

    def weight(w: Tensor) -> Any:
        if id(w) not in made:
            made.clear()
            made[id(w)] = reference.quantize_weight(w.detach().float(), 4, 32, True)
        return made[id(w)]

    def call(x: Tensor, w: Tensor) -> Tensor:
        return ops.quantized_linear(x, weight(w))

    def baseline(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, reference.quantize_weight(w.float(), 4, 32, True).dequantize(x.dtype))

    vary = (0, 1) if rows == 1 else (1,)
    return Case(call, baseline, baseline, make, vary, typical=64)


_NORM = ops.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), reference.rms_norm
_GATED = (
    lambda x, up: ops.gated_activation(x, up, "silu"),
    lambda x, up: F.silu(x) * up,
    lambda x, up: reference.gated_activation(x, up, "silu"),
)
_LOSS = _loss(ops), lambda x: F.cross_entropy(x, _targets(x, x.shape[-1])), _loss(reference)
_LINEAR_LOSS = _linear_loss(ops), _linear_loss(reference), _linear_loss(reference)
_DECODE = (
    _decode(ops),
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    _decode(reference),
)

CASES: dict[str, Case] = {
    "norm": Case(*_NORM, _rows),
    "norm_backward": Case(*_NORM, _rows, (0, 1), True, "backward"),
    "norm_weight_gradient": Case(*_NORM, _rows, (0, 1), True, "backward"),
    "activation": Case(*_GATED, lambda n, small: [torch.randn(7 if small else 8192, n)] * 2),
    "rope": Case(ops.rope, reference.rope, reference.rope, _turned),
    "cross_entropy": Case(*_LOSS, _logits(8192), gradients=True, typical=128256),
    "cross_entropy_sums": Case(*_LOSS, lambda n, small: _logits(65536)(1000, small)),
    "linear_cross_entropy": Case(*_LINEAR_LOSS, _vocabulary, gradients=True),
    "attention": _attention("forward"),
    "attention_kv": _attention("backward"),
    "attention_q": _attention("backward"),
    "attention_delta": _attention("backward"),
    "attention_fp32": _attention("forward", torch.float32),
    "attention_kv_fp32": _attention("backward", torch.float32),
    "attention_q_fp32": _attention("backward", torch.float32),
    "decode_attention": Case(*_DECODE, _cache, (1,)),
    "quantized_linear": _quantized(None),
    "quantized_row": _quantized(1),
    "feed_forward": _feed_forward(8192),
    "feed_forward_kept": _feed_forward(8192, True),
    "feed_forward_few": _feed_forward(16),
    "feed_forward_fp32": _feed_forward(8192, dtype=torch.float32),
}
