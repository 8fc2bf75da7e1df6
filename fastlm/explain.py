"""Who runs an operator and why the others do not; nothing falls back unsaid."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from fastlm import ops
from fastlm.ops import _measured, _registry
from fastlm.ops._registry import Verdict

_DEVICES = ("cpu", "cuda")


class Text(str):
    """A string that shows itself as it is, so that a prompt prints its lines."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(op_or_model: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Text:
    """Says which implementation runs and why the others do not.

    Args:
        op_or_model: an operator by name ("attention") or as a function, any function that calls
            operators, or a model.
        args, kwargs: what to call it with. Without them an operator's implementations are listed;
            with them the call is made, and every operator in it answers. A model without
            arguments is explained layer by layer (`fastlm.hf.explain_model`).

    Returns:
        The text.

    Raises:
        ValueError: an operator name that does not exist.
        TypeError: something that cannot be called.

    >>> print(explain("rms_norm", torch.ones(2, 8, dtype=torch.float64)))
    rms_norm on cpu, float64, weight=None: reference
      cuda      serves cuda tensors, not cpu
      cpu       takes float32, bfloat16, float16, not float64
      triton    serves cuda tensors, not cpu
      torch     chosen only where `fastlm tune` finds it faster
    """
    called = bool(args or kwargs)
    if isinstance(op_or_model, str):
        name = op_or_model
        if not called:
            return Text(_listing(name))
        return Text(_run(_function(name), args, kwargs))
    if isinstance(op_or_model, torch.nn.Module) and not called:
        return Text(importlib.import_module("fastlm.hf").explain_model(op_or_model))
    if not callable(op_or_model):
        raise TypeError(
            "explain: op_or_model must be an operator's name, a function or a model, "
            f"got {type(op_or_model).__name__}"
        )
    if not called and op_or_model in vars(ops).values():
        return Text(_listing(op_or_model.__name__))
    return Text(_run(op_or_model, args, kwargs))


def _function(name: str) -> Callable[..., Any]:
    function = getattr(ops, name, None)
    if name.startswith("_") or not callable(function):
        there = ", ".join(_registry.stems())
        raise ValueError(f"explain: no operator {name!r}; there are: {there}")
    return function


def _listing(asked: str) -> str:
    """Every backend of an operator's row, per device, with the reason where one is absent."""
    name = asked
    if name not in _registry.stems():  # "gated_activation" belongs to the row "activation"
        name = _function(name).__module__.rpartition(".")[2]
    if name not in _registry.stems():
        raise ValueError(
            f"explain: {asked!r} is no operator; there are: {', '.join(_registry.stems())}"
        )
    lines = []
    for device in _DEVICES:
        lines.append(f"{name} on {device} tensors, best first")
        for backend in _registry.backends(name):
            reasons = _registry.absent(name, backend, device)
            lines.append(f"  {backend.name:<10}{'; '.join(reasons) or 'here'}")
        lines += _table(name, device)
    if _registry.forced() is not None:
        lines.append(f"forced: {_registry.forced()}")
    return "\n".join(lines)


def _table(stem: str, device: str) -> list[str]:
    """What `fastlm tune` has measured of an operator here, and why other figures are not used."""
    lines = [
        f"  {entry}: {sizes} ({facts})"
        for facts, classes in _measured.verdicts(device).get(stem, {}).items()
        for sizes, entry in classes.items()
    ]
    return lines + [f"  {why}" for why in _measured.stale(stem, device)]


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    with _registry.recording() as verdicts:
        function(*args, **kwargs)
    if not verdicts:
        return "no operator of fastlm was called"
    counts: dict[str, int] = {}
    for verdict in verdicts:
        text = describe(verdict)
        counts[text] = counts.get(text, 0) + 1
    return "\n".join(
        text if n == 1 else text.replace("\n", f"  ({n} times)\n", 1) for text, n in counts.items()
    )


def describe(verdict: Verdict) -> str:
    """One verdict: the call's facts and who runs, then one line per backend passed over."""
    facts = [verdict.device, _plain(verdict.dtype)]
    facts += [f"{name}={_plain(value)}" for name, value in verdict.facts.items()]
    lines = [f"{verdict.stem} on {', '.join(facts)}: {verdict.chosen}"]
    lines += [f"  {name:<10}{'; '.join(reasons)}" for name, reasons in verdict.refused.items()]
    lines += [f"  {name:<10}could run too, stands behind" for name in verdict.idle]
    if verdict.tuned is not None:
        lines.append(f"  {verdict.tuned} for {verdict.sizes}")
    elif verdict.sizes:
        lines += [f"  {why}" for why in _measured.stale(verdict.stem, verdict.device)]
    return "\n".join(lines)


def _plain(value: object) -> str:
    return str(value).removeprefix("torch.")
