"""Times the implementations of operators on the calls of a program, and keeps the winners.

A call is measured with its own arguments: every implementation that can run it is checked against
float64 first (one that is over its budget is left out), then they take turns, forward alone or with
the backward pass where a gradient is wanted. The winner goes into the table that the chooser reads
(`fastlm.ops._measured`). `fastlm tune` does this beforehand; `tuning()`, or FASTLM_TUNE=1 in the
environment, does it when a class of calls comes for the first time. Nothing is measured while
torch.compile or a CUDA graph records, or inside a training run, whose bits have to repeat.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastlm import ops, testing
from fastlm.ops import _measured, _registry
from fastlm.ops._registry import Verdict

Call = Callable[..., Any]
Thunk = Callable[[], object]

SECONDS = 0.12  # of timing per class of calls


@dataclass(frozen=True)
class Result:
    """What came of one class of calls."""

    verdict: Verdict
    entry: _measured.Entry | None  # None: there was nothing to choose from
    wrong: dict[str, str] = field(default_factory=dict)  # left out, and why

    @property
    def name(self) -> str:
        """The class in words."""
        facts = _registry.fact_text(self.verdict.dtype, self.verdict.facts)
        return f"{self.verdict.stem} {self.verdict.sizes} ({facts})"

    @property
    def gain(self) -> float:
        """How many times as fast as what would have run untuned."""
        if self.entry is None or self.verdict.chosen not in self.entry.us:
            return 1.0
        return self.entry.us[self.verdict.chosen] / self.entry.us[self.entry.winner]


def candidates(verdict: Verdict) -> list[str]:
    """The implementations that a call is measured with, in the row's order."""
    return [name for name in verdict.able if name != "reference"]


def measure(
    verdict: Verdict,
    thunks: Sequence[Thunk],
    check: Callable[[], str],
    *,
    shape: str,
    seconds: float = SECONDS,
    realtime: bool = False,
) -> Result:
    """Times the candidates of one verdict and keeps the winner for this process.

    Args:
        verdict: as `_registry.unmeasured` collects it.
        thunks: the call, ready to be timed, with one or more sets of inputs to rotate.
        check: says what is wrong with the result of the implementation in force, or "".
        shape: of the call, for a reader of the table.
        seconds: of timing, over all candidates.
        realtime: raises the threads' priority in a sample (needs the right to do so).
    """
    wrong, right = {}, []
    for name in candidates(verdict):
        with _registry.trying(verdict.stem, name):
            fault = check()
        if fault:
            wrong[name] = fault
        else:
            right.append(name)
    if not right or (len(right) < 2 and not wrong):
        return Result(verdict, None, wrong)
    finished = [_finished(verdict, thunk) for thunk in thunks]
    times = _interleave(verdict, right, finished, seconds, realtime)
    us = {name: float(f"{times[name]:.4g}") for name in right}
    entry = _measured.Entry(_measured.winner(us), us, shape)
    facts = _registry.fact_text(verdict.dtype, verdict.facts)
    _measured.add(verdict.device, verdict.stem, facts, verdict.sizes, entry)
    return Result(verdict, entry, wrong)


def _interleave(
    verdict: Verdict, names: Sequence[str], thunks: Sequence[Thunk], seconds: float, realtime: bool
) -> Mapping[str, float]:
    """The least microseconds per call of each: what others on the machine disturb least."""
    timing = importlib.import_module("fastlm.cli.bench").suite("timing")
    times = timing.interleave(
        dict.fromkeys(names, thunks),
        seconds,
        realtime=realtime,
        within=lambda name: _registry.trying(verdict.stem, name),
    )
    return {name: times[name].least for name in names}


def _finished(verdict: Verdict, thunk: Thunk) -> Thunk:
    """The call and, on a GPU, the wait for its end."""
    if verdict.device != "cuda":
        return thunk

    def run() -> None:
        thunk()
        torch.cuda.synchronize()

    return run


# ---- calls as they come --------------------------------------------------------------------------


@contextlib.contextmanager
def tuning(
    *,
    seconds: float = SECONDS,
    again: bool = False,
    say: Callable[[Result], None] = lambda result: None,
) -> Iterator[list[Result]]:
    """Inside, the first call of each class of calls is measured before it is made.

    Args:
        seconds: of timing per class.
        again: measures what the table knows as well, once.
        say: gets each result as it comes.

    Yields:
        The results so far. They count for this process; `fastlm.ops._measured.save()` keeps them.

    >>> with tuning() as results:
    ...     y = ops.linear(torch.ones(64, 32), torch.ones(8, 32))
    """
    results: list[Result] = []
    names = [name for name in ops.__all__ if _registry.has_classes(_module(name))]
    functions = {name: getattr(ops, name) for name in names}
    with _registry.unmeasured(again) as waiting:
        watch = _Watch(waiting, results, seconds, say)
        for name, function in functions.items():
            setattr(ops, name, watch.watched(function))
        try:
            yield results
        finally:
            for name, function in functions.items():
                setattr(ops, name, function)


def _module(name: str) -> str:
    """The stem that a public function belongs to."""
    return getattr(ops, name).__module__.rpartition(".")[2]


class _Watch:
    """Puts itself before the operators, and measures the classes of calls not known yet."""

    def __init__(
        self,
        waiting: list[Verdict],
        results: list[Result],
        seconds: float,
        say: Callable[[Result], None],
    ) -> None:
        self.waiting, self.results, self.seconds, self.say = waiting, results, seconds, say
        self.met: set[tuple[Any, ...]] = set()
        self.busy = False

    def watched(self, function: Call) -> Call:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling() or self.busy:
                return function(*args, **kwargs)
            made = function(*args, **kwargs)
            if not self.waiting:
                return made
            new = [v for v in reversed(self.waiting) if self._is_new(v)]
            self.waiting.clear()
            if not new or not _measurable((*args, *kwargs.values())):
                return made
            self.busy = True
            try:
                self._measure(function, args, kwargs, new)
            finally:
                self.busy = False
                self.waiting.clear()
            return function(*args, **kwargs)

        return run

    def _is_new(self, verdict: Verdict) -> bool:
        facts = tuple(verdict.facts.items())
        key = (verdict.stem, verdict.device, verdict.dtype, facts, verdict.sizes)
        known = key in self.met
        self.met.add(key)
        return not known and len(candidates(verdict)) > 1

    def _measure(
        self, function: Call, args: tuple[Any, ...], kwargs: dict[str, Any], new: list[Verdict]
    ) -> None:
        call = _Arguments(function, args, kwargs)
        for verdict in new:  # what an operator asks of another comes first
            try:
                result = measure(
                    verdict,
                    [call.thunk()],
                    functools.partial(call.fault, verdict.stem),
                    shape=call.shape,
                    seconds=self.seconds,
                )
            except (RuntimeError, TypeError, ValueError) as error:
                text = f"fastlm could not measure {verdict.stem} {verdict.sizes}: {error}"
                warnings.warn(text, stacklevel=2)
                continue
            self.results.append(result)
            self.say(result)


def _measurable(values: Sequence[Any]) -> bool:
    """Whether these are real tensors that may be computed with once more, here and now."""
    if _measured.is_fixed() or _registry.forced() is not None:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    kinds = (Tensor, torch.nn.Parameter)
    tensors = [value for value in values if isinstance(value, Tensor)]
    return type(torch.empty(0)) is Tensor and all(type(x) in kinds for x in tensors)


class _Arguments:
    """A call of an operator, to be made again."""

    def __init__(self, function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        named: dict[int | str, Any] = dict(enumerate(args))
        named.update(kwargs.items())
        floats = {name: x for name, x in named.items() if is_float(x)}
        self.gradients = torch.is_grad_enabled() and any(x.requires_grad for x in floats.values())
        self.names = (
            [  # the arguments that want a gradient; the first where none does
                name for name, x in floats.items() if x.requires_grad and self.gradients
            ]
            or [*floats][:1]
        )
        self.tensors = [floats[name].detach() for name in self.names]

    @property
    def shape(self) -> str:
        """Of the tensors among the arguments, for a reader."""
        values = (*self.args, *self.kwargs.values())
        return " ".join("x".join(map(str, x.shape)) for x in values if isinstance(x, Tensor))

    def thunk(self) -> Thunk:
        """The call, with its backward pass where a gradient is wanted."""
        if not self.gradients:
            return lambda: self._call(self.tensors)
        leaves = [x.requires_grad_() for x in (t.detach() for t in self.tensors)]
        cotangents = [torch.ones_like(out) for out in self._call(leaves)]

        def step() -> object:
            made = self._call(leaves)
            return torch.autograd.grad(made, leaves, cotangents, allow_unused=True)

        return step

    def fault(self, stem: str) -> str:
        """What is wrong with the result of the implementation in force, or ""."""
        if not is_float(self._call(self.tensors)[0]):
            return ""  # a token is right or is another one as likely
        errors = testing.compare(
            lambda *x: self._call(x),
            lambda *x: self._by_torch(stem, x),
            lambda *x: self._exact(stem, x),
            self.tensors,
            gradients=self.gradients,
            draws=1,
        )
        return "; ".join(str(e) for e in errors if not e.ok)

    def _exact(self, stem: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with _registry.trying(stem, "reference"):
            return self._call(tensors, wide=True)

    def _by_torch(self, stem: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """By PyTorch's own kernels, or the formula written in its operators."""
        try:
            with _registry.trying(stem, "torch"):
                return self._call(tensors)
        except RuntimeError:
            with _registry.trying(stem, "reference"):
                return self._call(tensors)

    def _call(self, tensors: Sequence[Tensor], wide: bool = False) -> tuple[Tensor, ...]:
        """The outputs with these tensors; `wide`: what they do not replace in float64 too."""
        given = dict(zip(self.names, tensors, strict=True))

        def value(name: int | str, x: Any) -> Any:
            if name in given:
                return given[name]
            return x.double() if wide and is_float(x) else x

        args = [value(i, x) for i, x in enumerate(self.args)]
        kwargs = {name: value(name, x) for name, x in self.kwargs.items()}
        made = self.function(*args, **kwargs)
        outputs = made if isinstance(made, tuple) else (made,)
        return tuple(x for x in outputs if x is not None)


def is_float(x: object) -> bool:
    """Whether this is a tensor of floating-point numbers."""
    return isinstance(x, Tensor) and x.is_floating_point()


def install() -> None:
    """What FASTLM_TUNE=1 asks for: `tuning` until the process ends; the table is kept each time."""
    stack = contextlib.ExitStack()
    stack.enter_context(tuning(say=lambda result: _keep()))
    atexit.register(stack.close)


def _keep() -> None:
    try:
        _measured.save()
    except (OSError, ValueError) as error:
        warnings.warn(f"fastlm could not keep what it measured: {error}", stacklevel=2)
