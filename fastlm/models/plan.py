"""One token through all layers in one native call: the decode plan.

The module path (`fastlm.models.step`) calls nine operators a layer; for a small model their
dispatch costs more than their work, and each enters PyTorch's threads anew. A plan binds the
addresses of weights and cache once and runs every stage inside one parallel region
(csrc/torch/decode_plan.cpp). Attention is decode_attention's kernel and products are linear's
panels; the residual stream stays in fp32 between the layers, so bf16 results are not bit for bit
those of the modules but closer to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm import _ext, nn
from fastlm.models import parts
from fastlm.models.cache import KVCache
from fastlm.models.config import Config
from fastlm.models.parts import Layer, Parts, Rows, form, of
from fastlm.models.step import is_plain, make_step
from fastlm.ops import _registry
from fastlm.ops.activation import KINDS

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder

STEM = "decode_plan"
MAX_BATCH, MAX_HEAD = 16, 256  # csrc/ops/decode_plan.h
# What of a config the plan follows; another field must keep its default.
_KNOWN = {
    *("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate"),
    *("max_positions", "norm", "norm_eps", "positions", "rope_theta", "rope_scaling"),
    *("activation", "gated", "qkv_bias", "out_bias", "mlp_bias", "window", "tied_head"),
    *("bos_id", "eos_ids", "family", "extra"),
}
_Weight = tuple[dict[str, Any], str, int]  # a module's parameters, the name in it, the address


def unsupported(model: Decoder, cache: KVCache) -> list[str]:
    """Why a model cannot be decoded by a plan with this cache; empty: it can."""
    forced = _registry.forced()
    if forced not in (None, "cpu"):
        return [f"{forced} is forced"]
    if _ext.native is None:
        return [_ext.native_error or "no native kernels"]
    if STEM not in _ext.native_stems:
        return ["the native kernels were built before there was a plan: build again"]
    weight = model.embed.weight
    if weight.device.type != "cpu":
        return [f"serves cpu tensors, not {weight.device.type}"]
    if weight.dtype not in parts.DTYPES:
        return [f"takes float32, bfloat16, float16, not {str(weight.dtype).removeprefix('torch.')}"]
    if torch.is_autocast_enabled("cpu"):
        return ["autocast is on"]
    config = model.config
    reasons = unknown_fields(config)
    if not 1 <= cache.batch <= MAX_BATCH:
        reasons.append(f"takes up to {MAX_BATCH} sequences, not {cache.batch}")
    assert config.head_dim is not None  # set by Config
    if config.head_dim > MAX_HEAD:
        reasons.append(f"takes heads of up to {MAX_HEAD}, not {config.head_dim}")
    if not all(is_known(module) for module in model.modules()):
        reasons.append("a module was replaced or has hooks")
    if reasons:
        return reasons
    return _unfit_modules(model) or parts.unfit(parts.of(model)) or _unfit_cache(model, cache)


def unknown_fields(config: Config) -> list[str]:
    """What a config asks for that was not there when the plan was written."""
    return [
        f"does not know the config's {field.name}"
        for field in fields(Config)
        if field.name not in _KNOWN and getattr(config, field.name) != field.default
    ]


def _unfit_modules(model: Decoder) -> list[str]:
    """What about the modules differs from what the config says."""
    c, dtype = model.config, model.embed.weight.dtype
    block: Any
    norms = [n for block in model.blocks for n in (block.attention_norm, block.mlp_norm)]
    if len({_eps(norm, dtype) for norm in (*norms, model.norm)}) != 1:
        return ["the norms' eps differ"]
    for layer, block in enumerate(model.blocks):
        a, mlp = block.attention, block.mlp
        if (a.heads, a.kv_heads, a.head_dim) != (c.heads, c.kv_heads, c.head_dim):
            return [f"the heads of layer {layer} are not the config's"]
        if mlp.activation != c.activation or (mlp.gate is not None) != c.gated:
            return [f"the feed-forward of layer {layer} is not the config's"]
    return []


def _unfit_cache(model: Decoder, cache: KVCache) -> list[str]:
    c = model.config
    if type(cache) is not KVCache:
        return [f"the cache is a {type(cache).__name__}"]
    shape = (cache.batch, c.kv_heads, cache.capacity, c.head_dim)
    tensors = [*cache.keys, *cache.values]
    if len(tensors) != 2 * c.layers or any(
        tuple(x.shape) != shape
        or x.dtype != model.embed.weight.dtype
        or x.device.type != "cpu"
        or not x.is_contiguous()
        for x in tensors
    ):
        return ["the cache is not of the model's shape and type"]
    lengths = cache.lengths
    if lengths is not None and (lengths.dtype != torch.int64 or not lengths.is_contiguous()):
        return ["the cache's lengths are not int64"]
    return []


class BoundPlan:
    """The weights of some parts and a cache, bound. `parts.unfit` must have found nothing.

    It keeps the tensors it points at, so an address cannot come to mean something else; `stale`
    says when a module has others by now.

    Args:
        made_of: the modules.
        batch: sequences, or with `one_sequence` tokens of one that follow each other, 1 to 16.
        window: sliding window of the attention.
    """

    def __init__(
        self, made_of: Parts, batch: int, *, one_sequence: bool = False, window: int | None = None
    ) -> None:
        c, rope = made_of.config, made_of.rope
        assert _ext.native is not None and c.head_dim is not None  # the caller has asked
        self.batch = batch
        self._dtype = made_of.dtype
        self._tensors: list[Tensor] = []  # what the plan points at
        self._weights: dict[tuple[int, str], _Weight] = {}
        layers = [self._layer(layer) for layer in made_of.layers]
        others = [
            self._bind(made_of.embed, "weight"),
            0 if made_of.positions is None else self._bind(made_of.positions, "weight"),
            0 if rope is None else self._bind(rope, "cos"),
            0 if rope is None else self._bind(rope, "sin"),
            *self._both(made_of.norm),
            *self._product(made_of.head),
        ]
        sizes = {
            "dtype": parts.DTYPES.index(made_of.dtype),
            "batch": batch,
            "one_sequence": one_sequence,
            "hidden": c.hidden,
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "intermediate": c.intermediate,
            "vocab": c.vocab,
            "outputs": made_of.head.outputs,
            "places": made_of.places,
            "eps": made_of.eps,
            "centred": c.norm == "layer",
            "activation": KINDS.index(c.activation),
            "window": window or 0,
            "scale": 1 / math.sqrt(c.head_dim),
        }
        self._native = _ext.native.DecodePlan(sizes, layers, others)
        self._caches: list[Tensor] = []

    def stale(self) -> bool:
        """Whether a weight lies elsewhere than where the plan reads it."""
        if _registry.forced() not in (None, "cpu"):
            return True
        for names, name, address in self._weights.values():
            weight = names.get(name)
            if weight is None or weight.data_ptr() != address:
                return True
        return False

    def bind(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """The cache: a layer's keys and values each, contiguous [batch or 1, kv_heads, S, D]."""
        self._caches = [*keys, *values]
        addresses = [[x.data_ptr() for x in stored] for stored in (keys, values)]
        self._native.bind_cache(*addresses, keys[0].shape[2])

    def step(
        self,
        tokens: Tensor,
        logits: Tensor,
        *,
        past: int = 0,
        slots: Tensor | None = None,
        positions: Tensor | None = None,
        first: Tensor | None = None,
        limit: int | None = None,
        best: Tensor | None = None,
    ) -> None:
        """One token of each sequence; its keys and values enter the cache. All [B] int64.

        Args:
            tokens: the tokens.
            logits: [B, vocab] fp32, to be filled.
            past: the tokens' place in the cache, of one sequence that of the first.
            slots: the places where they differ.
            positions: where the tokens stand in their texts; the places by default.
            first: the place of the first key that each sequence sees.
            limit: `best` is sought among the logits before this one.
            best: gets the place of the largest logit; it may be `tokens`.

        Raises:
            IndexError: a token, place or position that is not there.
            RuntimeError: with best, a logit before the limit that is not finite.
        """
        self._native.step(
            tokens.data_ptr(),
            0 if positions is None else positions.data_ptr(),
            0 if slots is None else slots.data_ptr(),
            past,
            0 if first is None else first.data_ptr(),
            logits.data_ptr(),
            logits.shape[1] if limit is None else limit,
            0 if best is None else best.data_ptr(),
        )

    def _bind(self, module: Any, name: str) -> int:
        """The address of a parameter or buffer; 0 where it is None."""
        names = module._parameters if name in module._parameters else module._buffers
        tensor = names[name]
        if tensor is None:
            return 0
        self._tensors.append(tensor.detach())
        self._weights[id(names), name] = names, name, tensor.data_ptr()
        return int(tensor.data_ptr())

    def _both(self, module: Any) -> tuple[int, int]:
        bias = "bias" in module._parameters
        return self._bind(module, "weight"), self._bind(module, "bias") if bias else 0

    def _product(self, rows: Rows | None) -> list[int]:
        """The numbers of a product in the order of csrc/torch/decode_plan_python.h."""
        if rows is None:
            return [0] * 9
        module, first = rows.module, rows.first
        if not isinstance(module, nn.QuantizedLinear):
            weight, bias = self._both(module)
            stride, size = module.weight.stride(0), module.weight.element_size()
            weight += first * size * (1 if rows.transposed else stride)
            bias += first * size if bias else 0
            return [weight, bias, 0, 0, 0, 0, 0, stride, int(rows.transposed)]
        inputs = module.qweight.shape[1]
        values = self._bind(module, "values") + first * inputs * module.bits // 8
        bias, scale, minimum = (self._bind(module, name) for name in ("bias", "scale", "minimum"))
        steps = 2 * first * (inputs // module.group_size)
        return [
            values,
            bias + first * self._dtype.itemsize if bias else 0,
            scale + steps,
            minimum + steps if minimum else 0,
            module.group_size,
            *form(module, self._dtype),
            0,
            0,
        ]

    def _layer(self, layer: Layer) -> list[int]:
        return [
            *self._both(layer.attention_norm),
            *(number for rows in (layer.q, layer.k, layer.v) for number in self._product(rows)),
            *self._product(layer.out),
            *self._both(layer.mlp_norm),
            *self._product(layer.gate),
            *self._product(layer.up),
            *self._product(layer.down),
        ]


class DecodePlan:
    """A decoder's weights and a cache, bound. `unsupported` must have said nothing against it.

    With `rows` a step takes so many tokens of one sequence, 1 to 16, that follow each other (the
    cache must be of batch 1). Each has the bits that it would have in a step of its own.

    Attributes:
        logits: [B, vocab] fp32, of the last step; [rows, vocab] with rows.
        best: [B] or [rows] int64, the place of the largest of them.
    """

    def __init__(self, model: Decoder, cache: KVCache, rows: int | None = None) -> None:
        if rows is not None and (not 1 <= rows <= MAX_BATCH or cache.batch != 1 or cache.lengths):
            raise ValueError(
                f"DecodePlan: rows must be 1 to {MAX_BATCH} of one sequence, got {rows} of"
                f" {cache.batch}"
            )
        batch, self._new = (cache.batch, 1) if rows is None else (rows, rows)
        self._bound = BoundPlan(
            of(model), batch, one_sequence=rows is not None, window=cache.window
        )
        self.logits = torch.empty(batch, model.config.vocab)
        self.best = torch.empty(batch, dtype=torch.int64)
        self._cache = cache
        self._keys: Tensor | None = None

    def stale(self) -> bool:
        """Whether a weight lies elsewhere than where the plan reads it."""
        return self._bound.stale()

    def step(self, tokens: Tensor, limit: int | None = None) -> None:
        """Takes one token of each sequence: fills `logits` and `best`, continues the cache.

        Args:
            tokens: [B] or [rows] int64; may be `best`.
            limit: `best` is sought among the logits before this one.

        Raises:
            IndexError: a token or position beyond the model's.
            RuntimeError: a logit before the limit that is not finite.
        """
        cache = self._cache
        cache.reserve(self._new)
        if self._keys is not cache.keys[0]:
            self._keys = cache.keys[0]
            self._bound.bind(cache.keys, cache.values)
        self._bound.step(
            tokens.to(torch.int64).contiguous(),
            self.logits,
            past=cache.length,
            slots=cache.lengths,
            limit=limit,
            best=self.best,
        )
        cache.end(self._new)


class NextLogits:
    """(tokens [B]) -> logits [B, vocab] of what follows, by a plan where there can be one.

    Which way it goes is decided at the first step and again when a weight was replaced.
    `explain(model.generate, ...)` shows the verdict.
    """

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._plan: DecodePlan | None = None
        self._modules: Callable[[Tensor, KVCache], Tensor] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits, overwritten by the next call."""
        plan = self._current()
        if plan is not None:
            plan.step(tokens)
            return plan.logits
        assert self._modules is not None
        return self._model.logits(self._modules(tokens, self._cache))

    def best(self, tokens: Tensor, limit: int | None) -> Tensor:
        """[B], the likeliest next tokens among the first `limit`; overwritten by the next call."""
        plan = self._current()
        if plan is None:
            return self(tokens)[:, :limit].argmax(-1)
        plan.step(tokens, limit)
        return plan.best

    def _current(self) -> DecodePlan | None:
        if self._plan is not None and self._plan.stale():
            self._plan = None
        elif self._plan is not None or self._modules is not None:
            return self._plan
        reasons = unsupported(self._model, self._cache)
        if reasons:
            self._modules = make_step(self._model)
        else:
            self._plan = DecodePlan(self._model, self._cache)
        weight = self._model.embed.weight
        refused = {"cpu": reasons} if reasons else {}
        _registry.record(
            _registry.Verdict(
                STEM,
                weight.device.type,
                weight.dtype,
                {"batch": self._cache.batch},
                "modules" if reasons else "cpu",
                refused,
                [] if reasons else ["modules"],
            )
        )
        return self._plan


def is_known(module: torch.nn.Module) -> bool:
    """Whether a module is one of ours, quantized or not, without hooks."""
    return is_plain(module, also=nn.QuantizedLinear)


def _eps(norm: Any, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps
