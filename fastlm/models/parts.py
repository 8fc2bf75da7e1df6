"""What a decode plan is made of: the modules of a decoder, wherever they come from.

A plan reads weights by address, so it does not matter whether they belong to a `Decoder` or to a
model of transformers, nor whether q, k and v are one matrix or three. `unfit` says what about the
modules a plan cannot read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm import nn, ops
from fastlm.models.config import Config

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder


DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/common/dtype.h


@dataclass(frozen=True)
class Rows:
    """Some outputs of a linear layer: the rows of its weight from `first` on."""

    module: Any
    first: int
    outputs: int
    transposed: bool = False  # the weight is [in, out]


@dataclass(frozen=True)
class Layer:
    """One layer's modules."""

    attention_norm: Any
    q: Rows
    k: Rows
    v: Rows
    out: Rows
    mlp_norm: Any
    gate: Rows | None
    up: Rows
    down: Rows

    def products(self) -> Iterator[tuple[str, Rows]]:
        """Name and rows of each product."""
        for name in ("q", "k", "v", "out", "gate", "up", "down"):
            rows = getattr(self, name)
            if rows is not None:
                yield name, rows


@dataclass(frozen=True)
class Parts:
    """A decoder's modules.

    Attributes:
        config: the sizes.
        eps: of all norms.
        embed, positions: embeddings; positions may be None.
        rope: a module with the buffers cos and sin, [places, head_dim / 2] fp32, or None.
        places: positions that the tables or embeddings know.
        layers, norm, head: the rest.
    """

    config: Config
    eps: float
    embed: Any
    positions: Any
    rope: Any
    places: int
    layers: list[Layer]
    norm: Any
    head: Rows

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.embed.weight.dtype
        return dtype


def of(model: Decoder) -> Parts:
    """The parts of a `Decoder`."""
    c = model.config
    assert c.kv_heads is not None and c.head_dim is not None and c.intermediate is not None
    width, kv, wide = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.intermediate

    def layer(block: Any) -> Layer:
        attention, mlp = block.attention, block.mlp
        return Layer(
            block.attention_norm,
            Rows(attention.qkv, 0, width),
            Rows(attention.qkv, width, kv),
            Rows(attention.qkv, width + kv, kv),
            Rows(attention.out, 0, c.hidden),
            block.mlp_norm,
            None if mlp.gate is None else Rows(mlp.gate, 0, wide),
            Rows(mlp.up, 0, wide),
            Rows(mlp.down, 0, c.hidden),
        )

    head = model.embed if model.head is None else model.head
    eps: Any = model.norm.eps
    return Parts(
        c,
        torch.finfo(model.embed.weight.dtype).eps if eps is None else eps,
        model.embed,
        model.positions,
        model.rope,
        c.max_positions,
        [layer(block) for block in model.blocks],
        model.norm,
        Rows(head, 0, c.vocab),
    )


def unfit(parts: Parts) -> list[str]:
    """What about the weights is not as the config says, or not as a plan reads them."""
    dtype = parts.dtype
    if dtype not in DTYPES:
        return [f"takes float32, bfloat16, float16, not {str(dtype).removeprefix('torch.')}"]
    for name, tensor, shape in _tensors(parts):
        if tensor is None:
            if name.endswith("norm.weight"):
                return [f"{name} is missing"]
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter, ops.QuantizedWeight):
            return [f"{name} is a {type(tensor).__name__}"]
        if tuple(tensor.shape) != shape:
            return [f"{name} is {list(tensor.shape)}, not {list(shape)}"]
        if name.endswith(".qweight"):
            continue
        wanted = torch.float32 if name.startswith("rope.") else dtype
        if tensor.dtype != wanted or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return [f"{name} is not a contiguous {str(wanted).removeprefix('torch.')} cpu tensor"]
    return _unfit_integers(parts)


def form(module: nn.QuantizedLinear, dtype: torch.dtype) -> tuple[int, int]:
    """The weight's form and the digits of its rows: csrc/ops/quantized_linear.h."""
    kind = 0 if module.bits == 8 else 1 if module.minimum is None else 2
    digits = 1 if module.activations == "int8" else 4 if dtype == torch.float32 else 3
    return kind, digits


def _unfit_integers(parts: Parts) -> list[str]:
    """What the plan cannot do with the quantized layers."""
    head_dim = parts.config.head_dim
    assert head_dim is not None
    for name, rows in _products(parts):
        module = rows.module
        if not isinstance(module, nn.QuantizedLinear):
            continue
        qweight = module.qweight
        if not qweight.packed or not all(
            t is None or (t.is_contiguous() and t.is_cpu) for t in qweight[:3]
        ):
            return [f"the integers of {name} are not packed for the CPU"]
        if name.endswith((".q", ".k", ".v")) and head_dim % 16:
            return [f"quantized heads must be a multiple of 16, not {head_dim}"]
    for number, layer in enumerate(parts.layers):
        for names in (("gate", "up"), ("q", "k", "v")):
            kinds = {_kind(rows.module) for name, rows in layer.products() if name in names}
            if len(kinds) > 1:
                return [f"{' and '.join(names)} of layer {number} are quantized differently"]
    return []


def _kind(module: Any) -> tuple[int, int] | None:
    return form(module, torch.float32) if isinstance(module, nn.QuantizedLinear) else None


def _products(parts: Parts) -> Iterator[tuple[str, Rows]]:
    for i, layer in enumerate(parts.layers):
        for name, rows in layer.products():
            yield f"layer {i}.{name}", rows
    yield "head", parts.head


def _tensors(parts: Parts) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Every tensor a plan points at, with the shape it must have."""
    c = parts.config
    assert c.head_dim is not None and c.intermediate is not None  # set by Config
    width = c.heads * c.head_dim
    yield "embed.weight", parts.embed.weight, (c.vocab, c.hidden)
    if parts.positions is not None:
        yield "positions.weight", parts.positions.weight, (parts.places, c.hidden)
    if parts.rope is not None:
        for name in ("cos", "sin"):
            yield f"rope.{name}", getattr(parts.rope, name), (parts.places, c.head_dim // 2)
    norms = {"norm": parts.norm}
    for i, layer in enumerate(parts.layers):
        norms[f"layer {i}.attention_norm"] = layer.attention_norm
        norms[f"layer {i}.mlp_norm"] = layer.mlp_norm
    for name, norm in norms.items():
        yield f"{name}.weight", norm.weight, (c.hidden,)
        yield f"{name}.bias", getattr(norm, "bias", None), (c.hidden,)
    outputs = {id(rows.module): 0 for _, rows in _products(parts)}
    for _, rows in _products(parts):  # several may be of one matrix
        outputs[id(rows.module)] = max(outputs[id(rows.module)], rows.first + rows.outputs)
    for name, rows in _products(parts):
        module, out = rows.module, outputs[id(rows.module)]
        inner = name.rpartition(".")[2]
        inputs = width if inner == "out" else c.intermediate if inner == "down" else c.hidden
        shape = (inputs, out) if rows.transposed else (out, inputs)
        kind = "qweight" if isinstance(module, nn.QuantizedLinear) else "weight"
        yield f"{name}.{kind}", getattr(module, kind), shape
        yield f"{name}.bias", getattr(module, "bias", None), (out,)
