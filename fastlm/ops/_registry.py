"""The one place that decides which implementation of an operator runs.

A backend is one way of computing an operator. Each operator lists its backends per device, best
first; a backend answers `unsupported(...)` with the reasons it cannot take these arguments, an
empty list meaning that it can, and `slower(...)` with the measured reasons to stand back although
it can. Chosen is the first that can and does not stand back; or, where `fastlm tune` has measured
this class of calls here, the one that was fastest (`_measured`); or the one that FASTLM_BACKEND or
`use_backend` forces, which raises where it cannot run. Nothing falls back in silence:
`fastlm.explain` prints every verdict.

Within a process the verdict of a class of calls stays what it was at its first use. A call that
torch.compile traces takes the order of the list: the times of kernels called one by one say little
about a graph that the compiler fuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from fastlm import _ext, settings
from fastlm.ops import _measured

Reasons = list[str]
# (dtype, facts about the call, by name) -> reasons why the backend cannot run it
Unsupported = Callable[..., Reasons]


def _never(dtype: torch.dtype, **facts: Any) -> Reasons:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator."""

    name: str  # "cpu", "cuda", "triton", "torch" or "reference"
    devices: tuple[str, ...]  # device types it serves; empty: all
    unsupported: Unsupported
    slower: Unsupported = _never  # why one behind it is expected to be faster


@dataclass(frozen=True)
class Verdict:
    """What the chooser decided for one call, and why the others were passed over."""

    stem: str
    device: str
    dtype: torch.dtype
    facts: dict[str, Any]
    chosen: str
    refused: dict[str, Reasons]  # backend -> reasons
    idle: list[str]  # able backends that stand behind the chosen one
    sizes: str = ""  # the class of the call's sizes, where the operator tells them apart
    tuned: _measured.Entry | None = None  # what was measured for it here, if it counted
    usual: bool = True  # whether all sizes are chosen for alike
    able: tuple[str, ...] = ()  # who can run the call, in the row's order


_backends: dict[str, list[Backend]] = {}
_classes: dict[str, Callable[..., str]] = {}
Memory = dict[tuple[Any, ...], str]
_verdicts: Memory = {}
_memories: list[Memory] = [_verdicts]
_forced: str | None = settings.forced_backend()
_tried: dict[str, str] = {}  # operator -> backend, while they are timed
_recording: list[Verdict] | None = None
_unmeasured: list[Verdict] | None = None  # while tuning: calls of which no table knows a winner
_again = False  # while tuning: whether the others are collected too

_MOST = 4096  # verdicts a memory holds


def register(stem: str, *backends: Backend, classes: Callable[..., str] | None = None) -> None:
    """Declares an operator's backends, best first; "reference" is added last.

    `classes` names the class of the sizes that the operator hands to `settle`.
    """
    _backends[stem] = [*backends, Backend("reference", (), _never)]
    if classes is not None:
        _classes[stem] = classes


def stems() -> list[str]:
    """All operators."""
    return sorted(_backends)


def has_classes(stem: str) -> bool:
    """Whether calls of an operator are told apart by their sizes, so that winners can be kept."""
    return stem in _classes


def backends(stem: str) -> list[Backend]:
    """All backends of an operator, best first, present here or not."""
    return list(_backends[stem])


def forced() -> str | None:
    """The backend that FASTLM_BACKEND or `use_backend` forces, or None."""
    return _forced


def triton(unsupported: Unsupported, slower: Unsupported | None = None) -> Backend:
    """The backend "triton": after "cuda" and "cpu" in a row's list, so that theirs come first."""
    devices = ("cuda", "cpu") if settings.interpreted() else ("cuda",)
    return Backend("triton", devices, unsupported, *((slower,) if slower else ()))


def plain(unsupported: Unsupported = _never, slower: Unsupported | None = None) -> Backend:
    """The backend "torch", PyTorch's own kernels: the last in a row's list before "reference".

    It stands back unless `fastlm tune` found it faster or it is forced.
    """
    return Backend("torch", (), unsupported, slower or _only_if_faster)


def _only_if_faster(dtype: torch.dtype, **facts: Any) -> Reasons:
    return ["chosen only where `fastlm tune` finds it faster"]


def implementations(stem: str, device: str = "cpu") -> list[str]:
    """The backends of an operator that serve a device type and are present here."""
    return [b.name for b in _backends[stem] if not absent(stem, b, device)]


def choose(stem: str, x: torch.Tensor, **facts: Any) -> str:
    """The backend that runs operator `stem` on tensors like x; facts are hashable."""
    # every call of every operator comes through here: one lookup, x.device only off the CPU
    if is_dynamo_compiling():
        return _decide(stem, x.device.type, x.dtype, facts).chosen
    key = (stem, x.is_cpu or x.device.type, x.dtype, *facts.values())
    return _verdicts.get(key) or _judge(key, stem, x, facts)


def settle(
    stem: str, memory: Memory, key: tuple[Any, ...], x: torch.Tensor, sizes: Any, **facts: Any
) -> str:
    """The backend for a call whose key `memory` does not hold, as `choose`, with a view to sizes.

    Where nothing measured differs between sizes the verdict is remembered under the key, and calls
    come here no more. Else it is remembered for these very `sizes` (shapes and options, hashable),
    of which the row's `classes` makes the name of their class.
    """
    if is_dynamo_compiling():
        return _decide(stem, x.device.type, x.dtype, facts).chosen
    exact = key, sizes
    known = memory.get(exact)
    if known is not None:
        return known
    verdict = _decide(stem, x.device.type, x.dtype, facts, sizes)
    if _recording is not None:
        _recording.append(verdict)
    if _unmeasured is not None and verdict.sizes and (_again or not _known_here(verdict)):
        _unmeasured.append(verdict)
        return verdict.chosen
    return remember(memory, key if verdict.usual else exact, verdict.chosen)


def _known_here(verdict: Verdict) -> bool:
    """Whether the winner was measured here; a table that came with the package leaves it open."""
    return verdict.tuned is not None and not verdict.tuned.note


def memory() -> Memory:
    """A dict in which an operator keeps verdicts under keys of its own, filled by `remember`.

    For operators whose kernels may cost less than `choose`. The registry empties it whenever what
    is forced or recorded changes.
    """
    _memories.append({})
    return _memories[-1]


def remember(memory: Memory, key: tuple[Any, ...], chosen: str) -> str:
    """Keeps a verdict of `choose`, but not while recording or compiling."""
    if _recording is None and not torch.compiler.is_compiling():
        if len(memory) >= _MOST:
            memory.clear()
        memory[key] = chosen
    return chosen


def forget() -> None:
    """Lets every call be decided anew."""
    for memory in _memories:
        memory.clear()


def _judge(key: tuple[Any, ...], stem: str, x: torch.Tensor, facts: dict[str, Any]) -> str:
    """Decides a call not seen before, or every call while recording."""
    verdict = _decide(stem, x.device.type, x.dtype, facts)
    if _recording is not None:
        _recording.append(verdict)
    return remember(_verdicts, key, verdict.chosen)


def absent(stem: str, backend: Backend, device: str) -> Reasons:
    """Why a backend cannot serve tensors of a device type here, whatever their shape or type."""
    if backend.devices and device not in backend.devices:
        return [f"serves {', '.join(backend.devices)} tensors, not {device}"]
    if backend.name == "cpu" and _ext.native is None:
        return [_ext.native_error or "no native kernels"]
    if backend.name == "cpu" and stem not in _ext.native_stems:
        return ["the native kernels were built before this operator had any: build again"]
    if backend.name == "cuda" and not _ext.cuda_loaded:
        return [_ext.cuda_error or "no CUDA kernels"]
    if backend.name == "triton" and (reason := _ext.triton_error()):
        return [reason]
    return []


def _decide(
    stem: str, device: str, dtype: torch.dtype, facts: dict[str, Any], sizes: Any = None
) -> Verdict:
    refused: dict[str, Reasons] = {}
    able: list[Backend] = []
    for backend in _backends[stem]:
        reasons = absent(stem, backend, device) or backend.unsupported(dtype, **facts)
        if reasons:
            refused[backend.name] = reasons
        else:
            able.append(backend)
    names = tuple(backend.name for backend in able)
    size_class, tuned, usual = "", None, True
    forced = _tried.get(stem, _forced)
    if forced is not None:
        if forced not in names:
            why = "; ".join(refused.get(forced, ["this operator has no such implementation"]))
            raise RuntimeError(f"{stem}: backend {forced!r} is forced but cannot run: {why}")
        chosen, usual = forced, forced != "torch"  # what it can may depend on options
    else:
        if sizes is not None:
            size_class, tuned, usual = _measurement(stem, device, dtype, facts, sizes, able)
        if tuned is not None:
            chosen = tuned.winner
        else:
            chosen = ""
            for backend in able:
                if reasons := backend.slower(dtype, **facts):
                    refused[backend.name] = reasons
                chosen = chosen or ("" if reasons else backend.name)
    idle = [name for name in names if name != chosen and name not in refused]
    measured = (size_class, tuned, usual, names)
    return Verdict(stem, device, dtype, dict(facts), chosen, refused, idle, *measured)


def _measurement(
    stem: str,
    device: str,
    dtype: torch.dtype,
    facts: dict[str, Any],
    sizes: Any,
    able: list[Backend],
) -> tuple[str, _measured.Entry | None, bool]:
    """The class of a call, what was measured for it, and whether all classes have one winner."""
    size_class = _classes[stem](*sizes)
    measured = _measured.verdicts(device).get(stem, {})
    entry = measured.get(fact_text(dtype, facts), {}).get(size_class)
    if entry is not None and entry.winner not in [backend.name for backend in able]:
        entry = None
    first = able[0].name if able[0].slower is _never else None  # else it depends on the process
    winners = (e.winner for classes in measured.values() for e in classes.values())
    return size_class, entry, _unmeasured is None and all(name == first for name in winners)


def fact_text(dtype: torch.dtype, facts: dict[str, Any]) -> str:
    """Element type and facts of a call in words: "bfloat16, weight=bfloat16"."""
    words = [str(dtype), *(f"{name}={value}" for name, value in facts.items())]
    return ", ".join(word.replace("torch.", "") for word in words)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend inside the block, as FASTLM_BACKEND does; None lets the chooser choose."""
    global _forced
    if name is not None and name not in settings.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(settings.BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    forget()
    try:
        yield
    finally:
        _forced = before
        forget()


@contextlib.contextmanager
def recording() -> Iterator[list[Verdict]]:
    """Collects the verdicts of every operator call inside the block."""
    global _recording
    verdicts: list[Verdict] = []
    before = _recording
    _recording = verdicts
    forget()
    try:
        yield verdicts
    finally:
        _recording = before


@contextlib.contextmanager
def unmeasured(again: bool = False) -> Iterator[list[Verdict]]:
    """Inside, collects the verdicts of calls of which no table knows a winner; `again`: of all."""
    global _unmeasured, _again
    before = _unmeasured, _again
    _unmeasured, _again = [], again
    forget()
    try:
        yield _unmeasured
    finally:
        _unmeasured, _again = before
        forget()


@contextlib.contextmanager
def trying(stem: str, backend: str) -> Iterator[None]:
    """Inside, one operator runs on this backend, and others are chosen for as usual."""
    before = dict(_tried)
    _tried[stem] = backend
    forget()
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)
        forget()


def record(verdict: Verdict) -> None:
    """Shows a verdict made elsewhere to whoever is recording."""
    if _recording is not None:
        _recording.append(verdict)


def native(*dtypes: torch.dtype) -> Unsupported:
    """`unsupported` of a backend whose only limit is a list of element types."""

    def unsupported(dtype: torch.dtype, **facts: Any) -> Reasons:
        if dtype in dtypes:
            return []
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return [f"takes {names}, not {str(dtype).removeprefix('torch.')}"]

    return unsupported
