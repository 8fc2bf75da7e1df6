"""Attention that a model computes in a method of its own, of (query, key, value, attention_mask).

What the method does is measured instead of read: which keys a query sees, from its weights for
queries of zeros; by what it scales, from two keys of known scores. A window, a causal mask and a
scale are then arguments of the kernel, and the trial run of the whole layer confirms them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops

_MOST = 2048  # positions that are looked at


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
    causal, window, scale, dropouts = found

    def attend(
        self: Any,
        method: Callable[..., Any],
        weights_wanted: bool | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Any:
        if (
            weights_wanted
            or getattr(getattr(self, "config", None), "output_attentions", False)
            or not (query.dtype == key.dtype == value.dtype)
            or (self.training and any(self._modules[d].p for d in dropouts))  # type: ignore[union-attr]
        ):
            return method(query, key, value, mask)
        if mask is not None and mask.shape[-1] > key.shape[2]:
            mask = mask[..., : key.shape[2]]  # methods that get such a one cut it so
        if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
            mask = mask.to(query.dtype)
        options: dict[str, Any] = {"mask": mask, "scale": scale, "window": window}
        return ops.attention(query, key, value, causal=causal, **options), None

    return attend


def _measured(module: Any, method: Callable[..., Any]) -> Any:
    """(causal, window, scale, names of the dropouts); or what it does that is not known here."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        kept = [b.shape[-1] for b in module.buffers() if b.dim() == 4]
        device = next(module.parameters()).device
        count = min([*kept, _MOST])
        x = torch.zeros(1, 1, count, 1, device=device)
        made = method(x, x, x, None)
        if not (
            isinstance(made, tuple) and len(made) == 2 and made[1].shape[-2:] == (count, count)
        ):
            return "does not return its output and its weights"
        seen = made[1][0, 0] > 0
        at = torch.arange(count, device=device)
        causal = not bool(seen[0, 1:].any())
        behind = at[:, None] - at
        window = int(seen[-1].sum()) if causal else count
        visible = (behind >= 0) & (behind < window) if causal else torch.ones_like(seen)
        if not torch.equal(seen, visible):
            return "hides keys in another way than a window or a causal mask"
        # two keys, of which the second scores 1
        width = getattr(module, "head_dim", None)
        if not isinstance(width, int):
            return "has heads of unknown size"
        q, k = (torch.zeros(1, 1, 2, width, device=device) for _ in range(2))
        q[..., 0], k[..., 1, 0] = 1.0, 1.0
        row = method(q, k, k, None)[1][0, 0, 1].double()
        scale = math.log(float(row[1] / row[0]))
    finally:
        for m, mode in modes:
            m.training = mode
    usual = (1.0, width**-0.5)
    scale = next((s for s in usual if abs(s - scale) < 1e-5 * s), scale)
    dropouts = [n for n, m in module._modules.items() if isinstance(m, nn.Dropout) and "attn" in n]
    return causal, window if causal and window < count else None, scale, dropouts
