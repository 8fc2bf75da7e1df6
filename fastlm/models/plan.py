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

from fastlm import _ext, nn, ops
from fastlm.models.cache import KVCache
from fastlm.models.config import Config
from fastlm.models.step import is_plain, make_step
from fastlm.ops import _registry
from fastlm.ops.activation import KINDS

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder

STEM = "decode_plan"
MAX_BATCH, MAX_HEAD = 16, 256  # csrc/ops/decode_plan.h
_DTYPES = (torch.float32, torch.bfloat16)
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
    if weight.dtype not in _DTYPES:
        return [f"takes float32, bfloat16, not {str(weight.dtype).removeprefix('torch.')}"]
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
    return _unfit_weights(model) or _unfit_integers(model) or _unfit_cache(model, cache)


def unknown_fields(config: Config) -> list[str]:
    """What a config asks for that was not there when the plan was written."""
    return [
        f"does not know the config's {field.name}"
        for field in fields(Config)
        if field.name not in _KNOWN and getattr(config, field.name) != field.default
    ]


def _unfit_weights(model: Decoder) -> list[str]:
    """What about the modules differs from what the config says."""
    c, dtype = model.config, model.embed.weight.dtype
    block: Any
    epsilons = {_eps(module, dtype) for module in _norms(model)}
    if len(epsilons) != 1:
        return ["the norms' eps differ"]
    for layer, block in enumerate(model.blocks):
        a, mlp = block.attention, block.mlp
        if (a.heads, a.kv_heads, a.head_dim) != (c.heads, c.kv_heads, c.head_dim):
            return [f"the heads of layer {layer} are not the config's"]
        if mlp.activation != c.activation or (mlp.gate is not None) != c.gated:
            return [f"the feed-forward of layer {layer} is not the config's"]
    for name, tensor, shape in _shapes(model):
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


class DecodePlan:
    """A decoder's weights and a cache, bound. `unsupported` must have said nothing against it.

    With `rows` a step takes so many tokens of one sequence, 1 to 16, that follow each other (the
    cache must be of batch 1). Each has the bits that it would have in a step of its own.

    It keeps the tensors it points at, so an address cannot come to mean something else; `stale`
    says when the model or the cache has others by now.

    Attributes:
        logits: [B, vocab] fp32, of the last step; [rows, vocab] with rows.
        best: [B] or [rows] int64, the place of the largest of them.
    """

    def __init__(self, model: Decoder, cache: KVCache, rows: int | None = None) -> None:
        c, weight = model.config, model.embed.weight
        if rows is not None and (not 1 <= rows <= MAX_BATCH or cache.batch != 1 or cache.lengths):
            raise ValueError(
                f"DecodePlan: rows must be 1 to {MAX_BATCH} of one sequence, got {rows} of"
                f" {cache.batch}"
            )
        batch, self._new = (cache.batch, 1) if rows is None else (rows, rows)
        assert _ext.native is not None and c.head_dim is not None  # unsupported() was asked
        outputs = c.vocab
        self.logits = torch.empty(batch, outputs)
        self.best = torch.empty(batch, dtype=torch.int64)
        self._cache, self._dtype = cache, weight.dtype
        self._bound: list[Tensor] = []  # what the plan points at
        self._weights: list[_Weight] = []
        layers = [self._layer(block) for block in model.blocks]
        rope = model.rope
        others = [
            self._bind(model.embed, "weight"),
            0 if model.positions is None else self._bind(model.positions, "weight"),
            0 if rope is None else self._bind(rope, "cos"),
            0 if rope is None else self._bind(rope, "sin"),
            *self._both(model.norm),
            *self._product(model.embed if model.head is None else model.head),
        ]
        sizes = {
            "bf16": weight.dtype == torch.bfloat16,
            "batch": batch,
            "one_sequence": rows is not None,
            "hidden": c.hidden,
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "intermediate": c.intermediate,
            "vocab": weight.shape[0],
            "outputs": outputs,
            "places": c.max_positions,
            "eps": _eps(model.norm, weight.dtype),
            "centred": c.norm == "layer",
            "activation": KINDS.index(c.activation),
            "window": cache.window or 0,
            "scale": 1 / math.sqrt(c.head_dim),
        }
        self._native = _ext.native.DecodePlan(sizes, layers, others)
        self._caches: list[Tensor] = []

    def stale(self) -> bool:
        """Whether a weight lies elsewhere than where the plan reads it."""
        if _registry.forced() not in (None, "cpu"):
            return True
        for names, name, address in self._weights:
            weight = names.get(name)
            if weight is None or weight.data_ptr() != address:
                return True
        return False

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
        tokens = tokens.to(torch.int64).contiguous()
        cache.reserve(self._new)
        if not self._caches or self._caches[0] is not cache.keys[0]:
            self._caches = [*cache.keys, *cache.values]
            addresses = [x.data_ptr() for x in self._caches]
            half = len(cache.keys)
            self._native.bind_cache(addresses[:half], addresses[half:], cache.capacity)
        self._native.step(
            tokens.data_ptr(),
            0 if cache.lengths is None else cache.lengths.data_ptr(),
            cache.length,
            self.logits.data_ptr(),
            self.logits.shape[1] if limit is None else limit,
            self.best.data_ptr(),
        )
        cache.end(self._new)

    def _bind(self, module: Any, name: str) -> int:
        """The address of a parameter or buffer; 0 where it is None."""
        names = module._parameters if name in module._parameters else module._buffers
        tensor = names[name]
        if tensor is None:
            return 0
        self._bound.append(tensor.detach())
        self._weights.append((names, name, tensor.data_ptr()))
        return int(tensor.data_ptr())

    def _both(self, module: Any) -> tuple[int, int]:
        bias = "bias" in module._parameters
        return self._bind(module, "weight"), self._bind(module, "bias") if bias else 0

    def _product(self, module: Any) -> list[int]:
        """weight, bias, scale, minimum, group, form and digits of the rows."""
        if not isinstance(module, nn.QuantizedLinear):
            return [*self._both(module), 0, 0, 0, 0, 0]
        return [
            self._bind(module, "values"),
            self._bind(module, "bias"),
            self._bind(module, "scale"),
            self._bind(module, "minimum"),
            module.group_size,
            *_form(module, self._dtype),
        ]

    def _layer(self, block: Any) -> list[int]:
        """The addresses in the order of csrc/torch/decode_plan_python.h."""
        attention, mlp = block.attention, block.mlp
        return [
            *self._both(block.attention_norm),
            *self._product(attention.qkv),
            *self._product(attention.out),
            *self._both(block.mlp_norm),
            *([0] * 7 if mlp.gate is None else self._product(mlp.gate)),
            *self._product(mlp.up),
            *self._product(mlp.down),
        ]


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


def _form(module: nn.QuantizedLinear, dtype: torch.dtype) -> tuple[int, int]:
    """The weight's form and the digits of its rows: csrc/ops/quantized_linear.h."""
    form = 0 if module.bits == 8 else 1 if module.minimum is None else 2
    digits = 1 if module.activations == "int8" else 4 if dtype == torch.float32 else 3
    return form, digits


def _unfit_integers(model: Decoder) -> list[str]:
    """What the plan cannot do with the quantized layers of a model."""
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    for name, module in named:
        qweight = module.qweight
        if not qweight.packed or not all(
            t is None or (t.is_contiguous() and t.is_cpu) for t in qweight[:3]
        ):
            return [f"the integers of {name} are not packed for the CPU"]
        head_dim = model.config.head_dim
        if name.endswith("attention.qkv") and head_dim and head_dim % 16:
            return [f"quantized heads must be a multiple of 16, not {head_dim}"]
    block: Any
    for layer, block in enumerate(model.blocks):
        pair = {block.mlp.up, block.mlp.gate} - {None}
        kinds = {
            _form(m, torch.float32) if isinstance(m, nn.QuantizedLinear) else None for m in pair
        }
        if len(kinds) > 1:
            return [f"gate and up of layer {layer} are quantized differently"]
    return []


def _norms(model: Decoder) -> list[Any]:
    blocks: Any = model.blocks
    return [n for b in blocks for n in (b.attention_norm, b.mlp_norm)] + [model.norm]


def _eps(norm: Any, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps


def _shapes(model: Decoder) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Every tensor a plan points at, with the shape it must have."""
    c = model.config
    assert c.head_dim is not None and c.intermediate is not None  # set by Config
    found: list[tuple[str, Any, tuple[int, ...]]] = []
    block: Any

    def add(name: str, module: Any, *shape: int) -> None:
        kind = "qweight" if isinstance(module, nn.QuantizedLinear) else "weight"
        found.append((f"{name}.{kind}", getattr(module, kind), shape))
        found.append((f"{name}.bias", getattr(module, "bias", None), shape[:1]))

    add("embed", model.embed, c.vocab, c.hidden)
    if model.positions is not None:
        add("positions", model.positions, c.max_positions, c.hidden)
    if model.rope is not None:
        for name in ("cos", "sin"):
            shape = (c.max_positions, c.head_dim // 2)
            found.append((f"rope.{name}", getattr(model.rope, name), shape))
    for i, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        add(f"blocks.{i}.attention_norm", block.attention_norm, c.hidden)
        add(f"blocks.{i}.attention.qkv", attention.qkv, sum(c.qkv_rows), c.hidden)
        add(f"blocks.{i}.attention.out", attention.out, c.hidden, c.qkv_rows[0])
        add(f"blocks.{i}.mlp_norm", block.mlp_norm, c.hidden)
        if mlp.gate is not None:
            add(f"blocks.{i}.mlp.gate", mlp.gate, c.intermediate, c.hidden)
        add(f"blocks.{i}.mlp.up", mlp.up, c.intermediate, c.hidden)
        add(f"blocks.{i}.mlp.down", mlp.down, c.hidden, c.intermediate)
    add("norm", model.norm, c.hidden)
    if model.head is not None:
        add("head", model.head, c.vocab, c.hidden)
    return found
