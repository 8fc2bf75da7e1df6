"""Attention and decoder layers: their own forward, with the calls that have a kernel exchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.hf import _probe
from fastlm.hf._modules import Candidate, Match, add_norm, is_norm_forward
from fastlm.hf._rewrite import (
    CannotRewrite,
    Edit,
    Sites,
    find_sites,
    plain_forward,
    rewrapped,
    rewrite,
)
from fastlm.ops import _registry
from fastlm.ops._library import autocasts

_DEAF = "its forward is not told whether its weights are wanted"


@dataclass
class Blocks:
    """What is known about the classes met during one call of `patch`."""

    wanted: frozenset[str]
    rotary: nn.Module | None  # what makes the model's rotation tables
    _sites: dict[type, Sites | str] = field(default_factory=dict)
    _ropes: dict[Any, Callable[..., Any] | str] = field(default_factory=dict)
    _made: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def match(self, module: nn.Module) -> tuple[list[str], Match]:
        """(parts that stay and why, the candidate, a reason, or None for another kind)."""
        cls = type(module)
        named = cls.__name__.lower().endswith("attention") and bool(
            self.wanted & {"attention", "rope"}
        )
        if isinstance(module, nn.MultiheadAttention) and named:
            return [], "PyTorch's own attention: one function that takes all of its parameters"
        if cls.__module__.startswith("torch.nn"):
            return [], None
        sites = self._sites.get(cls)
        if sites is None:
            try:
                sites = find_sites(plain_forward(cls))
            except CannotRewrite as e:
                sites = str(e)
            self._sites[cls] = sites
        if isinstance(sites, str):
            return [], sites if named else None
        named = named or (sites.attends and bool(self.wanted & {"attention"}))
        if replace(sites, keeps=False, attends=False) == Sites():
            wraps = any("attention" in type(m).__name__.lower() for m in module.children())
            known = "its forward has no call that is known here"
            return [], known if named and not wraps else None
        edit, stems, texts, kept = Edit(), [], [], []
        if sites.attention and "attention" in self.wanted:
            used = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if used in ("sdpa", "fastlm", "eager"):
                from fastlm.hf.attention_interface import select

                edit.attention = select
                stems.append("attention")
                texts.append("attention")
            else:
                kept.append(f"attention: asks for {used!r}; fastlm's stands in for sdpa and eager")
        if sites.sdpa and "attention" in self.wanted:
            from fastlm.hf.attention_interface import sdpa

            edit.sdpa = sdpa
            stems.append("attention")
            texts.append("attention (in place of scaled_dot_product_attention)")
        if sites.methods and "attention" in self.wanted:
            from fastlm.hf._own_attention import match_method

            method = match_method(module, sites.methods)
            if isinstance(method, str):
                kept.append(f"attention: {method}")
            else:
                edit.method = method
                stems.append("attention")
                texts.append(f"attention (in place of {sites.methods[0]})")
        own = sites.attention or sites.sdpa or sites.methods
        if sites.deaf and sites.keeps and not own and "attention" in self.wanted:
            kept.append(f"attention: {_DEAF}")
        elif sites.products and not own and "attention" in self.wanted:
            from fastlm.hf import _scores

            edit.product = _scores.product
            edit.released = _scores.kept if sites.deaf else _scores.released
            stems.append("attention")
            texts.append("attention (in place of its products and softmax)")
        if "rope" in self.wanted:
            for name in set(sites.rope):
                rope = self._rope(plain_forward(cls).__globals__[name])
                if isinstance(rope, str):
                    kept.append(f"rope: {rope}")
                else:
                    edit.rope[name] = rope
                    stems.append("rope")
                    texts.append("rope")
        norms = [n for n in sites.add_norm if is_norm_forward(_child(module, n))]
        if norms:
            edit.add_norm, edit.norms = add_norm, frozenset(norms)
            stems.append("add_norm")
            texts.append(f"residual add in {', '.join(norms)}")
        edit.told = frozenset(n for n in sites.untold if _waits(module._modules.get(n)))
        if edit.told:
            stems.append("told")
            texts.append(f"output_attentions to {', '.join(edit.told)}")
        if not stems:
            return kept, None
        try:
            function = self._rewritten(cls, edit)
            eager = getattr(getattr(module, "config", None), "_attn_implementation", "") == "eager"
            written_out = edit.method is not None or edit.product is not None
            eager = eager or written_out  # which adds its mask to the scores
            form = "hides" if sites.hides else "additive" if eager else "seen"
            width, tables, like = self._input(module, norms)
            biases = _biases(module, like, edit.product is not None)
            calls = _probe.arguments_for(function, width, tables, like, form, biases)
            if stems == ["add_norm"] and not _probe.can(module, calls):
                # a layer around a recurrence, whose mask says which tokens count
                calls = _probe.arguments_for(function, width, tables, like, "tokens", biases)
            if edit.product is not None:
                _confirm_attention(module, function, calls)
        except (CannotRewrite, _probe.Mismatch) as e:
            return kept, str(e)
        # eager attention also returns its weights, which fastlm's never makes
        first = eager and (edit.attention is not None or written_out)
        return kept, Candidate(tuple(stems), ", ".join(texts), function, calls, first)

    def _input(self, module: nn.Module, norms: list[str]) -> tuple[int, Any, Tensor]:
        """Width of the hidden states, rotation tables, a tensor on the device."""
        for child in (*(module._modules[n] for n in norms), *module.modules()):
            weight = getattr(child, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() <= 2:  # more: of several experts
                width = child.in_features if isinstance(child, nn.Linear) else weight.shape[0]
                sizes = [getattr(m, "head_dim", None) for m in module.modules()]
                head = next((s for s in sizes if isinstance(s, int)), None)
                return width, _probe.rotation_tables(self.rotary, head, weight), weight
        raise _probe.Mismatch("no trial run: the width of its input was not found")

    def _rewritten(self, cls: type, edit: Edit) -> Callable[..., Any]:
        key = (cls, edit.attention, *edit.rope.items(), edit.norms, edit.sdpa, edit.method)
        key = (*key, edit.product, edit.told)
        if key not in self._made:
            edited = rewrite(plain_forward(cls), edit)
            function = rewrapped(cls, edited, _with_checkpointing)
            self._made[key] = function
        return self._made[key]

    def _rope(self, function: Callable[..., Any]) -> Callable[..., Any] | str:
        if function not in self._ropes:
            self._ropes[function] = match_rope(function)
        return self._ropes[function]


def _waits(child: Any) -> bool:
    """Whether a child puts its scores off and looks for output_attentions in its keywords."""
    forward = inspect.unwrap(_own_forward(child) or _waits)
    if "_fastlm_product" not in forward.__code__.co_freevars:
        return False
    parameters = inspect.signature(forward).parameters.values()
    named = any(p.name == "output_attentions" for p in parameters)
    return not named and any(p.kind is p.VAR_KEYWORD for p in parameters)


def _own_forward(child: Any) -> Any:
    return getattr(getattr(child, "__dict__", {}).get("forward"), "__func__", None)


def _biases(module: nn.Module, like: Tensor, own: bool) -> dict[str, Tensor]:
    """Biases of the scores for a trial run; alibi, which some can do without, where `own`."""
    found = (getattr(module, name, None) for name in ("num_heads", "n_heads"))
    heads = next((n for n in found if isinstance(n, int)), None)
    if heads is None:
        return {}
    made = {"position_bias": _probe.random((heads, 1, _probe.TOKENS), 17, like)}
    if own:  # which takes batch and heads as one
        made["alibi"] = made["position_bias"].repeat(_probe.BATCH, 1, 1)
    return made


def _confirm_attention(module: nn.Module, function: Any, calls: _probe.Calls) -> None:
    """Raises Mismatch unless a forward with its product put off comes to the kernel every time."""
    from fastlm.hf import _scores

    values, returned = _probe.parameters(module), _scores.returned.count
    for arguments, keywords in calls:
        with _registry.recording() as verdicts:
            try:
                _probe.run(module, function, values, arguments, keywords)
            except Exception as e:
                text = f"the trial run failed: {type(e).__name__}: {str(e)[:120]}"
                raise _probe.Mismatch(text) from e
        if not {"attention", "decode_attention"} & {v.stem for v in verdicts}:
            raise _probe.Mismatch("between the products of its attention is a step not known here")
        if _scores.returned.count != returned:
            raise _probe.Mismatch(f"attention: {_DEAF}")


def _child(module: nn.Module, name: str) -> Any:
    return getattr(module._modules.get(name), "__dict__", {}).get("forward")


def _with_checkpointing(function: Callable[..., Any]) -> Callable[..., Any]:
    """While gradients are checkpointed the class's own forward runs, which knows how."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return type(self).forward(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    forward.__wrapped__ = function  # type: ignore[attr-defined]
    return forward


@dataclass(frozen=True)
class Rotation:
    """How a function (q, k, cos, sin) rotates heads, in the terms of ops.rope."""

    interleaved: bool
    half: bool  # only the first half of the tables is read, an angle for each pair
    narrow: bool  # the tables hold one angle for each pair: half as wide as what rotates
    backwards: bool  # by the opposite angle

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        width = cos.shape[-1]
        if self.half:
            cos, sin = cos[..., : width // 2], sin[..., : width // 2]
        width *= 2 if self.narrow else 1
        sin = -sin if self.backwards else sin
        return ops.rope(q, k, cos, sin, interleaved=self.interleaved, rotary_dim=width)


# interleaved, half, narrow, backwards: what the rotations of transformers' models were found to be
_ROTATIONS = [
    Rotation(*form)
    for form in (
        (False, False, False, False),
        (True, False, False, False),
        (True, True, False, False),
        (False, False, True, False),
        (True, False, True, False),
        (False, False, False, True),
    )
]


def match_rope(function: Callable[..., Any]) -> Callable[..., Any] | str:
    """The replacement of a function (q, k, cos, sin) that rotates, or why there is none."""
    found = next((form for form in _ROTATIONS if _rotates(function, form, partial=False)), None)
    if found is None:
        return f"{getattr(function, '__name__', 'its rotation')} pairs elements in another way"
    rotation = found
    partial = _rotates(function, rotation, partial=True)

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        width = cos.shape[-1] * (2 if rotation.narrow else 1)
        if (
            args
            or kwargs
            or not (q.dim() == k.dim() == 4 and cos.dim() == 3)
            or not (width == q.shape[-1] or (partial and width < q.shape[-1]))
            or q.dtype != k.dtype
            # The result would be wider than q; under autocast the product narrows it again.
            or (cos.dtype != q.dtype and not autocasts(q))
        ):
            return function(q, k, cos, sin, *args, **kwargs)
        return rotation(q, k, cos, sin)

    return rope


def _rotates(function: Callable[..., Any], form: Rotation, partial: bool) -> bool:
    """Whether a function rotates heads of 16, or half of each, so, whatever the tables hold."""
    width = (8 if partial else 16) // (2 if form.narrow else 1)
    q, k = _probe.random((2, 4, 5, 16), 1), _probe.random((2, 2, 5, 16), 2)
    cos, sin = _probe.random((2, 5, width), 3), _probe.random((2, 5, width), 4)
    with torch.no_grad():
        try:
            made = function(q, k, cos, sin)
        except Exception:
            return False
        return _probe.distance(made, form(q, k, cos, sin)) <= _probe.BAR
