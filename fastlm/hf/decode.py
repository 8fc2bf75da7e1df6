"""Decoding of a patched model: a step of `generate` by the decode plan.

The forward of a patched causal language model first looks whether it is asked for one token of
each sequence after a cache, on the CPU, and nothing else. Then all layers and the head run in one
native call (`fastlm.models.plan`) on the model's own parameters. In every other case, and whenever
something stands in the way (hooks, gradients, an adapter, outputs that only the modules can give),
the model's own forward runs.

The cache stays transformers' own. A dynamic one gets tensors with room to grow, of which its layers
hold views as long as the text, so nothing is copied from token to token; a layer that holds
anything else, after cropping, reordering or a step of the modules, is taken over anew. A static one
is written in place.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fastlm import _ext
from fastlm.hf._plain_decoder import Layout, Unfit, recognise
from fastlm.models.parts import unfit
from fastlm.models.plan import MAX_BATCH, STEM, BoundPlan
from fastlm.ops import _registry

_ROOM = 64  # tokens that a dynamic cache gets room for at least
_ANSWERED = frozenset(
    {
        *("input_ids", "attention_mask", "past_key_values", "position_ids", "cache_position"),
        *("use_cache", "return_dict", "logits_to_keep"),
    }
)
_ATTENTIONS = (None, "sdpa", "eager", "fastlm")  # they differ in rounding alone

# what is known of a model, of a cache, or why a plan does not fit it
_layouts: weakref.WeakKeyDictionary[nn.Module, Layout | str] = weakref.WeakKeyDictionary()
_runs: weakref.WeakKeyDictionary[Any, _Run | str] = weakref.WeakKeyDictionary()


def obstacle(model: Any) -> str:
    """Why no plan can decode a model; "" where one can. It is remembered for `forward`."""
    if _ext.native is None or STEM not in _ext.native_stems:
        return _ext.native_error or "no native kernels"
    found: Layout | str
    try:
        found = recognise(model)
    except Unfit as reason:
        found = str(reason)
    _layouts[model] = found
    return found if isinstance(found, str) else ""


def forward(cls: type, inner: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a patched model: a plan's step, or `inner` where that cannot be."""
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    names = list(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if "cache" in given:  # its name from 5.24 on
                given["past_key_values"] = given.pop("cache")
            out = _step(self, given)
            if out is not None:
                return out
        return inner(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]  # generate goes by it
    forward.whole = True  # type: ignore[attr-defined]  # verify compares it by its logits
    forward.inner = inner  # type: ignore[attr-defined]
    return forward


def _step(model: Any, given: dict[str, Any]) -> Any:
    """The output of one step by a plan, or None."""
    tokens, cache = given.get("input_ids"), given.get("past_key_values")
    if type(tokens) is not Tensor or tokens.dim() != 2 or tokens.shape[1] != 1 or cache is None:
        return None
    out: Any = _unusual(model, given)
    if not out:
        run = _runs.get(cache)
        known = run is not None
        if run is None or (isinstance(run, _Run) and (run.model is not model or run.stale())):
            try:
                run = _Run(model, cache)
            except Unfit as reason:
                run = str(reason)
            _runs[cache] = run
        try:
            out = run if isinstance(run, str) else run.step(cache, given)
        except Unfit as reason:
            out = str(reason)
        if known and not isinstance(out, str):
            return out
    _record(model, len(tokens), out if isinstance(out, str) else "")
    return None if isinstance(out, str) else out


def _record(model: Any, batch: int, reason: str) -> None:
    weight = model.get_input_embeddings().weight
    refused = {"cpu": [reason]} if reason else {}
    chosen, idle = ("modules", []) if reason else ("cpu", ["modules"])
    facts = {"batch": batch, "model": type(model).__name__}
    verdict = _registry.Verdict(
        STEM, weight.device.type, weight.dtype, facts, chosen, refused, idle
    )
    _registry.record(verdict)


def _unusual(model: Any, given: dict[str, Any]) -> str:
    """What a call asks for, or where it runs, that a plan does not know; "" for a plain step."""
    for name, value in given.items():
        if name not in _ANSWERED and value is not None and value is not False:
            return f"does not know the argument {name}"
    if given.get("use_cache") is False or given.get("return_dict") is False:
        return "the call wants no cache, or a tuple"
    if not isinstance(given.get("logits_to_keep", 0), int):
        return "logits_to_keep is a tensor"
    config = model.config
    if config._attn_implementation not in _ATTENTIONS:
        return f"its attention is {config._attn_implementation!r}"
    if (
        getattr(config, "output_attentions", False)
        or getattr(config, "output_hidden_states", False)
        or not getattr(config, "return_dict", True)
    ):
        return "the configuration asks for outputs of its modules"
    if _registry.forced() not in (None, "cpu"):
        return f"{_registry.forced()} is forced"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "hooks of all modules are on"
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
    ):
        return "it is being traced or transformed"
    return ""


def _unknown_cache(cache: Any) -> str:
    from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        return f"the cache is a {type(cache).__name__}, or offloaded"
    kinds = {type(layer) for layer in cache.layers}
    if kinds != {DynamicLayer} and kinds != {StaticLayer}:
        return f"the cache has layers {', '.join(sorted(k.__name__ for k in kinds))}"
    if kinds == {StaticLayer} and not isinstance(
        getattr(cache.layers[0], "cumulative_length", None), Tensor
    ):
        return "a static cache of this release of transformers does not tell its length"
    return ""


class _Run:
    """A plan that continues one cache.

    Raises:
        Unfit: the cache is of another kind, or the model has changed since it was recognised.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.model = model
        reason = _unknown_cache(cache)
        if not reason and model not in _layouts:  # a copy of a patched model
            reason = obstacle(model)
        layout = _layouts.get(model, reason)
        if isinstance(layout, str):
            raise Unfit(reason or layout)
        self._layout: Layout = layout
        self._watched = [
            (m.__dict__, m.__dict__.get("forward")) for m in model.modules() if m is not model
        ]
        self._children = [
            (parent._modules, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
        ]
        for _, own in self._watched:
            if own is not None and not getattr(getattr(own, "__func__", None), "fastlm", False):
                raise Unfit("another tool has replaced a module's forward")
        if self._unwatched():
            raise Unfit("a module has hooks or is in training mode")
        self._plan: BoundPlan | None = None
        self._places = 0
        self._storage: Tensor | None = None  # [2 layers, B, kv_heads, capacity, D]
        self._held: list[Tensor] = []  # what the cache's layers hold: keys, values, keys, ...

    def stale(self) -> bool:
        """Whether the model is not what it was."""
        if self._plan is not None and self._plan.stale():
            return True
        return self._unwatched() or any(
            children.get(name) is not child for children, name, child in self._children
        )

    def _unwatched(self) -> bool:
        return self.model.training or any(
            d["_forward_hooks"]
            or d["_forward_pre_hooks"]
            or d["training"]
            or d.get("forward") is not own
            for d, own in self._watched
        )

    def step(self, cache: Any, given: dict[str, Any]) -> Any:
        """The output.

        Raises:
            Unfit: the modules must answer; the cache is as it was.
        """
        tokens, layers = given["input_ids"], cache.layers
        if not all(layer.is_initialized for layer in layers):
            raise Unfit("the cache is empty")
        static = hasattr(layers[0], "cumulative_length")
        take = self._take_static if static else self._take_dynamic
        past = take(layers, len(tokens))
        assert self._plan is not None
        first = _first_keys(given.get("attention_mask"), len(tokens), past)
        positions = _positions(given, len(tokens), past)
        config = self._layout.config
        logits = torch.empty(len(tokens), config.vocab)
        try:
            self._plan.step(
                tokens.reshape(-1).to(torch.int64).contiguous(),
                logits,
                past=past,
                positions=positions,
                first=first,
            )
        except IndexError as error:  # the modules know what to do
            raise Unfit(str(error)) from None
        if static:
            for layer in layers:
                layer.cumulative_length.add_(1)
        else:
            self._show(layers, past + 1)
        dtype = self.model.get_input_embeddings().weight.dtype
        return self._layout.output(logits=logits.to(dtype)[:, None], past_key_values=cache)

    def _bind(self, keys: list[Tensor], values: list[Tensor]) -> None:
        batch, _, capacity, _ = keys[0].shape
        if self._plan is None or self._plan.batch != batch or self._places < capacity:
            made = self._layout.parts(self.model, capacity)
            reasons = unfit(made)
            if reasons:
                raise Unfit(reasons[0])
            self._plan, self._places = BoundPlan(made, batch), capacity
        self._plan.bind(keys, values)

    def _check(self, tensors: list[Tensor], batch: int) -> None:
        """Raises Unfit unless keys and values are of the model's shapes."""
        c, weight = self._layout.config, self.model.get_input_embeddings().weight
        if not 1 <= batch <= MAX_BATCH:
            raise Unfit(f"takes up to {MAX_BATCH} sequences, not {batch}")
        shape = (batch, c.kv_heads, tensors[0].shape[-2], c.head_dim)
        if len(tensors) != 2 * c.layers or any(
            type(x) is not Tensor
            or tuple(x.shape) != shape
            or x.dtype != weight.dtype
            or x.device != weight.device
            for x in tensors
        ):
            raise Unfit("the cache is not of the model's shape and type")

    def _take_static(self, layers: list[Any], batch: int) -> int:
        """Binds a static cache in place; its length."""
        held = [x for layer in layers for x in (layer.keys, layer.values)]
        if len(held) != len(self._held) or any(
            a is not b for a, b in zip(held, self._held, strict=True)
        ):
            self._check(held, batch)
            if not all(x.is_contiguous() for x in held):
                raise Unfit("the cache is not contiguous")
            self._bind(held[::2], held[1::2])
            self._held = held
        lengths = {int(layer.cumulative_length) for layer in layers}
        if len(lengths) > 1 or not 1 <= max(lengths) < held[0].shape[2]:
            raise Unfit("the cache is empty or full, or its layers differ")
        return lengths.pop()

    def _take_dynamic(self, layers: list[Any], batch: int) -> int:
        """Gives a dynamic cache room for a token; its length."""
        held, storage = self._held, self._storage
        past: int = layers[0].keys.shape[-2]
        if (
            storage is not None
            and past < storage.shape[3]
            and len(held) == 2 * len(layers)
            and storage.shape[1] == batch
            and all(
                layer.keys is held[2 * i] and layer.values is held[2 * i + 1]
                for i, layer in enumerate(layers)
            )
        ):
            return past
        held = [x for layer in layers for x in (layer.keys, layer.values)]
        self._check(held, batch)
        if past < 1:
            raise Unfit("the cache is empty")
        b, heads, _, size = held[0].shape
        capacity = past + max(_ROOM, past // 2)
        storage = held[0].new_empty(len(held), b, heads, capacity, size)
        for to, x in zip(storage, held, strict=True):
            to[:, :, :past] = x
        stored = list(storage)
        self._bind(stored[::2], stored[1::2])
        self._storage = storage
        self._show(layers, past)
        return past

    def _show(self, layers: list[Any], length: int) -> None:
        """Lets the layers hold what is there of the text."""
        assert self._storage is not None
        self._held = held = list(self._storage[:, :, :, :length].unbind(0))
        for i, layer in enumerate(layers):
            layer.keys, layer.values = held[2 * i], held[2 * i + 1]


def _first_keys(mask: Any, batch: int, past: int) -> Tensor | None:
    """The first key that each sequence sees, [B]; None where all see every key.

    Raises:
        Unfit: a mask that hides something else than padding on the left.
    """
    if isinstance(mask, dict) and mask.keys() == {"full_attention"}:
        mask = mask["full_attention"]  # of the kinds of layers that a model may have
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not mask.is_cpu:
        raise Unfit("the mask is no tensor on the CPU")
    if mask.dim() == 2 and mask.shape == (batch, past + 1):
        visible = mask != 0
    elif mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.shape[3] > past:
        visible = mask[:, 0, 0]
        if mask.is_floating_point():  # 0, or the lowest number
            hidden = visible <= torch.finfo(mask.dtype).min / 2
            if not bool(((visible == 0) | hidden).all()):
                raise Unfit("the mask has other values than those of padding")
            visible = ~hidden
        if visible.dtype != torch.bool or bool(visible[:, past + 1 :].any()):
            raise Unfit("the mask shows keys that are not there")
        visible = visible[:, : past + 1].expand(batch, -1)
    else:
        raise Unfit(f"the mask is of shape {list(mask.shape)}")
    if bool(visible.all()):
        return None
    first = visible.to(torch.int8).argmax(1)
    if not torch.equal(visible.sum(1), past + 1 - first):
        raise Unfit("the mask hides more than padding on the left")
    return first


def _positions(given: dict[str, Any], batch: int, past: int) -> Tensor | None:
    """The tokens' positions in their texts, [B]; None where they are their places in the cache."""
    where = given.get("cache_position")
    if where is not None and (where.numel() != 1 or int(where) != past):
        raise Unfit("cache_position is not the end of the cache")
    ids = given.get("position_ids")
    if ids is None:
        return None
    if type(ids) is not Tensor or ids.shape not in ((1, 1), (batch, 1)) or not ids.is_cpu:
        raise Unfit("position_ids are not one of each sequence")
    return ids.reshape(-1).expand(batch).to(torch.int64).contiguous()
