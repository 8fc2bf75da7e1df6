"""Attention that a model computes in a method of its own, of (query, key, value, attention_mask).

What the method does is measured instead of read: which keys a query sees, from its weights for
queries of zeros; by what it scales, from two keys of known scores; how low it puts what it hides.
A window, a causal mask and a scale are then arguments of the kernel, and the trial run of the whole
layer confirms them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops

_MOST = 2048  # positions that are looked at


@dataclass(frozen=True)
class _Found:
    """What a method was found to compute."""

    causal: bool
    window: int | None
    scale: float
    # The method hides by adding a number, not infinity; its hidden keys weigh nothing as long as
    # no score is further from zero than this. None: for all scores.
    bound: float | None
    turned: bool  # its keys come as [B, H, D, T]
    alone: bool  # without weights asked for, it returns a list of the output alone
    dropouts: tuple[str, ...]


def match_method(module: Any, names: tuple[str, ...]) -> Callable[..., Any] | str:
    """The replacement of a layer's calls of such a method, or why there is none."""
    if len(set(names)) != 1:
        return f"several methods compute it: {', '.join(names)}"
    name = names[0]
    try:
        with torch.no_grad():
            found = _measured(module, getattr(module, name))
    except Exception as e:
        return f"its {name} could not be tried: {type(e).__name__}: {str(e)[:80]}"
    if isinstance(found, str):
        return f"its {name} {found}"

    def attend(
        self: Any,
        method: Callable[..., Any],
        weights_wanted: bool | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *rest: Any,
    ) -> Any:
        if (
            weights_wanted
            or any(rest)
            or getattr(getattr(self, "config", None), "output_attentions", False)
            or not (query.dtype == key.dtype == value.dtype)
            or (self.training and any(self._modules[d].p for d in found.dropouts))  # type: ignore[union-attr]
            or (found.bound is not None and not _hidden(query, key, mask, found))
        ):
            return method(query, key, value, mask, *rest)
        if found.turned:
            key = key.transpose(-1, -2)
        if mask is not None and mask.shape[-1] > key.shape[2]:
            mask = mask[..., : key.shape[2]]  # methods that get such a one cut it so
        if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
            mask = mask.to(query.dtype)
        options: dict[str, Any] = {"mask": mask, "scale": found.scale, "window": found.window}
        out = ops.attention(query, key, value, causal=found.causal, **options)
        return [out] if found.alone else (out, None)

    return attend


def _hidden(query: Tensor, key: Tensor, mask: Tensor | None, found: _Found) -> bool:
    """Whether keys that a method hides by a finite number weigh nothing, whatever the scores are.

    By Cauchy-Schwarz, no score is larger than the longest query times the longest key.
    """
    if torch.compiler.is_compiling():  # nothing can be looked at
        return False
    bound = found.bound
    assert bound is not None
    longest = query.detach().norm(dim=-1).amax() * key.detach().norm(dim=-2 + (not found.turned))
    fits = longest.amax() * abs(found.scale) <= bound
    if mask is not None:
        # A query that sees no key weighs the hidden ones alike: that is left to the method.
        rows, columns = query.shape[-2], key.shape[-1 if found.turned else -2]
        if not mask.is_floating_point() or mask.shape[-1] != columns:
            return False
        seen = (mask > -bound).expand(*mask.shape[:-2], rows, columns)
        fits = fits & seen.tril(columns - rows).any(-1).all() & (mask <= 0).all()
    return bool(fits)


def _measured(module: Any, method: Callable[..., Any]) -> _Found | str:
    """What a method computes; or what it does that is not known here."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        return _measure(module, method)
    finally:
        for m, mode in modes:
            m.training = mode


def _measure(module: Any, method: Callable[..., Any]) -> _Found | str:
    kept = [b.shape[-1] for b in module.buffers() if b.dim() == 4]
    device = next(module.parameters()).device
    count = min([*kept, _MOST])
    x = torch.zeros(1, 1, count, 1, device=device)
    five = "output_attentions" in inspect.signature(method).parameters
    asked = (True,) if five else ()
    turned = False
    try:
        made = method(x, x, x, None, *asked)
    except RuntimeError:  # of a product whose shapes do not fit
        turned, made = True, method(x, x.transpose(-1, -2), x, None, *asked)

    def weights(query: Tensor, key: Tensor) -> Tensor:
        key = key.transpose(-1, -2) if turned else key
        return method(query, key, query, None, *asked)[1][0, 0].double()

    if not (
        isinstance(made, (tuple, list)) and len(made) == 2 and made[1].shape[-2:] == (count, count)
    ):
        return "does not return its output and its weights"
    seen = made[1][0, 0] > 0
    at = torch.arange(count, device=device)
    causal = not bool(seen[0, 1:].any())
    behind = at[:, None] - at
    window = int(seen[-1].sum()) if causal else count
    visible = (behind >= 0) & (behind < window) if causal else torch.ones_like(seen)
    alike = visible / visible.sum(-1, keepdim=True)
    if not (torch.equal(seen, visible) and torch.allclose(made[1][0, 0], alike)):
        return "hides keys in another way than a window or a causal mask"
    # two keys, of which the second scores 1
    width = _width(module)
    if width is None:
        return "has heads of unknown size"
    q, k = (torch.zeros(1, 1, 2, width, device=device) for _ in range(2))
    q[..., 0], k[..., 1, 0] = 1.0, 1.0
    row = weights(q, k)[1]
    scale = math.log(float(row[1] / row[0]))
    usual = (1.0, width**-0.5)
    scale = next((s for s in usual if abs(s - scale) < 1e-5 * s), scale)
    bound = _bound(weights, q, scale) if causal else math.inf
    if bound == 0 or (bound != math.inf and window < count):
        return "hides keys by a number that scores can reach"
    alone = five and len(method(q, k.transpose(-1, -2) if turned else k, q, None, False)) == 1
    every = tuple(n for n, m in module._modules.items() if isinstance(m, nn.Dropout))
    dropouts = tuple(n for n in every if "attn" in n or "attention" in n) or every
    kept_window = window if causal and window < count else None
    limit = None if bound == math.inf else bound
    return _Found(causal, kept_window, scale, limit, turned, alone, dropouts)


def _bound(weights: Callable[[Tensor, Tensor], Tensor], q: Tensor, scale: float) -> float:
    """The largest power of ten up to which scores leave nothing to a hidden key; infinity: all."""
    found = 0.0
    for exponent in range(1, 31):
        score = 10.0**exponent
        k = torch.zeros_like(q)
        k[..., 0, 0], k[..., 1, 0] = -score / scale, score / scale  # query 0 sees the first only
        if float(weights(q, k)[0, 1]) != 0.0:
            return found
        found = score
    return math.inf


def _width(module: Any) -> int | None:
    """The size of a head."""
    for name in ("head_dim", "head_size"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    whole, heads = getattr(module, "split_size", None), getattr(module, "n_head", None)
    return whole // heads if isinstance(whole, int) and isinstance(heads, int) else None
