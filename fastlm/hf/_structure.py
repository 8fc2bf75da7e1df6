"""When two modules are alike, so that the trial runs of one hold for the other."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

_STANDARD = frozenset(nn.Module().__dict__) | {"forward"}
_NUMBERS = ("layer_idx", "layer_id")
_CACHES = {"cache", "past_key_values", "past_key_value", "layer_past", "past_key", "cache_params"}


def structure(module: nn.Module) -> Any:
    """Equal for modules that a trial run on random parameters cannot tell apart."""
    key: list[Any] = []
    for name, m in module.named_modules():
        own = m.__dict__.get("forward")
        key.append((name, type(m), id(getattr(own, "__func__", own))))
        for attribute, value in m.__dict__.items():
            if attribute not in _STANDARD and not (attribute in _NUMBERS and _caches(m)):
                simple = value is None or isinstance(value, (bool, int, float, str, torch.Size))
                simple = simple or type(value) is tuple
                key.append((attribute, value if simple else id(value)))
        key += [len(h) for n, h in m.__dict__.items() if n.endswith("_hooks") and h is not None]
        key += [
            (n, None if t is None else (tuple(t.shape), t.dtype, t.device, type(t)))
            for group in (m._parameters, m._buffers)
            for n, t in group.items()
        ]
    return tuple(key)


def _caches(module: nn.Module) -> bool:
    """Whether a module needs the number of its layer to find its place in a cache.

    Such a forward is edited, and does with the number what it did. Where a forward of ours takes
    the place of all of it, a norm scaled by its depth for one, the number has to count.
    """
    return not _CACHES.isdisjoint(inspect.signature(type(module).forward).parameters)
