"""The model half of `fastlm.explain`: what runs in each layer, and which kernels that means."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.explain import describe
from fastlm.hf import _probe
from fastlm.hf._paths import collapsed
from fastlm.hf.patch import is_ours, patch, suspended
from fastlm.hf.verify import _arguments
from fastlm.ops import _registry
from fastlm.ops._registry import Verdict

_WARM, _PASSES = 2, 5  # forward passes before those that are timed, and these


@dataclass
class Coverage:
    """How much of a model runs on fastlm's kernels, and what the rest is."""

    modules: int = 0  # that hold parameters and run on them
    of: int = 0  # that hold parameters
    without: Counter[str] = field(default_factory=Counter)  # class -> how many others
    time: float = 0.0  # share of the time of operators in the fastest forward pass
    others: list[tuple[str, float]] = field(default_factory=list)  # operator of PyTorch, its share

    def __str__(self) -> str:
        text = f"coverage: {self.modules} of {self.of} modules with parameters"
        if self.without:
            text += f" (not {', '.join(f'{n} {cls}' for cls, n in self.without.most_common())})"
        text += f"; {self.time:.0%} of the time in operators, in the fastest of {_PASSES} passes"
        if self.others:
            largest = ", ".join(f"{name} {share:.0%}" for name, share in self.others[:4])
            text += f"\n  the rest: {largest}"
        return text


def explain_model(model: nn.Module, inputs: Any = None) -> str:
    """What `patch` does to each module of a model, and which kernels then run and why.

    Args:
        model: patched or not; it is as it was afterwards.
        inputs: what to call it with, as for `verify`; made up by default.

    Returns:
        Text: the report of the patch; one line for each kind of call of an operator in a forward
        pass, with the backend that ran and the modules that called it, and below it why others did
        not run; and the coverage (see `coverage`).
    """
    with suspended(model), patch(model) as made:
        lines = [made.report()]
    with _patched(model):
        try:
            arguments = _arguments(model, inputs)
        except TypeError as e:
            return "\n".join([*lines, str(e)])
        with torch.no_grad(), _registry.recording() as verdicts, _callers(model, verdicts) as paths:
            model(**arguments)
        covered = coverage(model, inputs)
    calls: dict[str, list[str]] = {}
    for verdict, path in zip(verdicts, paths, strict=True):
        calls.setdefault(describe(verdict), []).append(path)
    lines.append(f"one forward pass calls fastlm's operators {len(verdicts)} times:")
    for text, callers in calls.items():
        first, *rest = text.splitlines()
        n = len(callers)
        lines += [f"  {first}  ({n} times)" if n > 1 else f"  {first}"]
        lines += [f"    in {', '.join(collapsed(callers))}", *(f"  {r}" for r in rest)]
    return "\n".join([*lines, str(covered)])


def coverage(model: nn.Module, inputs: Any = None) -> Coverage:
    """The share of a model that runs on fastlm's kernels; of a model without a patch, once patched.

    Args:
        model: as for `explain_model`.
        inputs: what to call it with, as for `verify`; made up by default.

    Returns:
        A Coverage. Modules count where they hold parameters themselves. The time is that of the
        fastest of some forward passes on `inputs`, after others that warm up: each operator by
        itself, without Python's share of it and without views, which move nothing. What the
        chooser leaves to PyTorch inside one of our operators is ours.
    """
    made = Coverage()
    with _patched(model):
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is None:
                continue
            made.of += 1
            if is_ours(module.__dict__.get("forward")):
                made.modules += 1
            else:
                made.without[type(module).__name__] += 1
        arguments = _arguments(model, inputs)
        with torch.no_grad():
            for _ in range(_WARM):
                model(**arguments)
            passes = [_timed(model, arguments) for _ in range(_PASSES)]
    spent = min(passes, key=lambda c: sum(c.values()))
    total = sum(spent.values()) or 1
    made.time = spent.pop("fastlm", 0) / total
    made.others = [(name, t / total) for name, t in spent.most_common()]
    return made


class _Clock(TorchDispatchMode):
    """Times every operator. PyTorch's profiler would print lines of its own to the terminal."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.spent: Counter[str] = Counter()  # name, or "fastlm" -> nanoseconds
        self.inside = 0  # how many modules are running whose whole forward is ours

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        start = self.now()
        out = func(*args, **(kwargs or {}))
        ours = self.inside or func.namespace == "fastlm"
        self.spent["fastlm" if ours else func._schema.name] += self.now() - start
        return out

    def now(self) -> int:
        """Nanoseconds, once the device has done what it was asked for."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter_ns()


def _timed(model: nn.Module, arguments: dict[str, Any]) -> Counter[str]:
    """What the operators of one forward pass take, by name; "fastlm": those of ours."""
    clock = _Clock(next((p.device for p in model.parameters()), torch.device("cpu")))

    def enter(module: nn.Module, args: Any) -> None:
        clock.inside += _wholly_ours(module)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        clock.inside -= _wholly_ours(module)

    with _hooked(enter, leave), clock:
        model(**arguments)
    return clock.spent


def _wholly_ours(module: nn.Module) -> bool:
    """Whether its forward is no edited one of the model's: all that it calls is ours."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    made_here = getattr(function, "__module__", "").startswith("fastlm.hf.")
    return made_here and not hasattr(function, "__wrapped__") and not hasattr(function, "whole")


@contextlib.contextmanager
def _patched(model: nn.Module) -> Iterator[None]:
    """Patched and in evaluation mode inside the block."""
    ours = any(is_ours(m.__dict__.get("forward")) for m in model.modules())
    with contextlib.nullcontext() if ours else patch(model), _probe.evaluating(model):
        yield


@contextlib.contextmanager
def _callers(model: nn.Module, verdicts: list[Verdict]) -> Iterator[list[str]]:
    """The path of the innermost module that ran when each verdict was given."""
    names = {id(m): path for path, m in model.named_modules()}
    stack: list[str] = []
    paths: list[str] = []

    def note() -> None:
        paths.extend([stack[-1] if stack else ""] * (len(verdicts) - len(paths)))

    def enter(module: nn.Module, args: Any) -> None:
        note()
        stack.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        note()
        stack.pop()

    with _hooked(enter, leave):
        yield paths
        note()


@contextlib.contextmanager
def _hooked(enter: Any, leave: Any) -> Iterator[None]:
    """PyTorch's hooks for all modules inside the block: one of its own would change its path."""
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
