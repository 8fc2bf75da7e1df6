"""Feed-forward blocks: two or three linear maps around an activation."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.hf import _probe
from fastlm.hf._modules import (
    ACTIVATIONS,
    Candidate,
    Match,
    Note,
    is_conv1d,
    is_plain,
    kind_of_activation,
)


def match_feed_forward(module: nn.Module, device: torch.device) -> Match:
    """Two or three linear maps around an activation."""
    children = dict(module.named_children())
    linears = {n: m for n, m in children.items() if isinstance(m, nn.Linear)}
    conv = [n for n, m in children.items() if is_conv1d(m)]
    dropouts = [n for n, m in children.items() if isinstance(m, (nn.Dropout, nn.Identity))]
    others = [n for n in children if n not in (*linears, *conv, *dropouts)]
    if len(linears) + len(conv) not in (2, 3) or len(others) > 1:
        return None
    if any(True for n in others for _ in children[n].parameters()):
        return None  # no activation: an adapter, a norm
    if next(module.parameters(recurse=False), None) is not None:
        return None
    functions = [children[n] for n in others] or [
        f
        for n, f in module.__dict__.items()
        if callable(f) and not n.startswith("_") and n != "forward"
    ]
    if len(functions) > 1:
        return None
    if conv and functions:
        return Note("its weights are stored [in, out]: its parts are replaced one by one")
    if conv:
        return None
    named = bool(functions)  # otherwise its forward may have an activation written into it
    if not all(is_plain(m) for m in linears.values()):
        return "its linear maps are of a special kind or have hooks" if named else None
    kinds = [kind_of_activation(functions[0], device)] if named else list(ACTIVATIONS)
    if kinds == [None]:
        return f"its activation is none of {', '.join(ACTIVATIONS)}"
    roles = _roles(linears)
    if not roles:
        return "its linear maps do not fit together" if named else None
    x = _probe.rows_of(linears[roles[0].up].in_features).to(device)
    adds = list(inspect.signature(type(module).forward).parameters)[2:] == ["residual"]
    calls: _probe.Calls = [((x, _probe.random(x.shape, 1, x)) if adds else (x,), {})]
    if not named and not _probe.can(module, calls):
        return None
    numbers = (n for n, v in module.__dict__.items() if type(v) in (int, float))
    rates = tuple(n for n in numbers if "drop" in n)
    for role, kind in itertools.product(roles, kinds):
        for trained in (True, False):  # what it drops out may be written into its forward, too
            forward = feed_forward(role, str(kind), tuple(dropouts), rates, trained, adds)
            try:
                _probe.compare(module, forward, calls)
            except Exception:
                continue
            form = "gated " if role.gate else ""
            text = f"feed_forward ({form}{kind}{', residual' if adds else ''})"
            text += "" if trained else ", in evaluation only: in training it is something else"
            return Candidate(("feed_forward",), text, forward, [])
    return "the trial run differs for every assignment of its linear maps" if named else None


@dataclass(frozen=True)
class Roles:
    """Which linear map does what, by name; gate and up may be the two halves of one."""

    up: str
    down: str
    gate: str | None = None
    gate_first: bool = True  # of the halves

    @property
    def halves(self) -> bool:
        return self.gate == self.up


def _roles(linears: dict[str, nn.Linear]) -> list[Roles]:
    """Every assignment whose shapes fit, the likely ones first."""
    names = list(linears)
    size = {n: (m.in_features, m.out_features) for n, m in linears.items()}
    found = []
    if len(names) == 2:
        for up, down in (names, reversed(names)):
            if size[up][1] == size[down][0]:
                found.append(Roles(up, down))
            if size[up][1] == 2 * size[down][0]:
                found += [Roles(up, down, up), Roles(up, down, up, gate_first=False)]
        return found
    for down in reversed(names):
        a, b = (n for n in names if n != down)
        if size[a] == size[b] and size[a][1] == size[down][0]:
            found += [Roles(b, down, a), Roles(a, down, b)]
    return found


def feed_forward(
    roles: Roles,
    kind: str,
    dropouts: tuple[str, ...],
    rates: tuple[str, ...] = (),
    trained: bool = True,
    adds: bool = False,
) -> Callable[..., Any]:
    """The forward of a patched feed-forward block; linear maps are looked up by name.

    dropouts, rates: modules and numbers of the block that drop something out in training, which is
    left to the class's own forward. trained: not all training is. adds: its second argument, if
    there is one.
    """
    up, down, gate = roles.up, roles.down, roles.gate

    def forward(self: nn.Module, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        parts: dict[str, Any] = self._modules
        i, o = parts[up], parts[down]
        g = i if gate is None else parts[gate]
        if (
            options
            or len(rest) > adds  # arguments that were not tried
            or not is_plain(i)
            or not is_plain(o)
            or not (g is i or is_plain(g))
            or (self.training and (not trained or _drops(self, dropouts, rates)))
        ):
            return type(self).forward(self, x, *rest, **options)
        a, b, c = i._parameters, o._parameters, g._parameters
        w_in, b_in, w_gate, b_gate = a["weight"], a["bias"], c["weight"], c["bias"]
        if roles.halves:
            w_gate, w_in = _halves(w_in, roles.gate_first)
            b_gate, b_in = (None, None) if b_in is None else _halves(b_in, roles.gate_first)
        elif gate is None:
            w_gate = b_gate = None
        made = ops.feed_forward(
            x,
            w_in,
            b["weight"],
            w_gate=w_gate,
            b_in=b_in,
            b_out=b["bias"],
            b_gate=b_gate,
            activation=kind,
        )
        return made + rest[0] if rest else made

    return forward


def _drops(module: nn.Module, dropouts: tuple[str, ...], rates: tuple[str, ...]) -> bool:
    return any(getattr(module._modules[d], "p", 0.0) for d in dropouts) or any(
        module.__dict__[r] for r in rates
    )


def _halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2)
    return (first, second) if gate_first else (second, first)
