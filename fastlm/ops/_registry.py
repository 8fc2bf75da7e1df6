"""The one place that decides which implementation of an operator runs.

A backend is one way of computing an operator. Each operator lists its backends per device, best
first; a backend answers `unsupported(...)` with the reasons it cannot take these arguments, an
empty list meaning that it can, and `slower(...)` with the measured reasons to stand back although
it can. `choose` returns the first that can and does not stand back, or the one forced by
FASTLM_BACKEND or `use_backend`; a forced backend that cannot run raises. Nothing falls back in
silence: `fastlm.explain` prints every verdict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from fastlm import _ext, settings

Reasons = list[str]
# (dtype, facts about the call, by name) -> reasons why the backend cannot run it
Unsupported = Callable[..., Reasons]


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator."""

    name: str  # "cpu", "cuda", "triton", "torch" or "reference"
    devices: tuple[str, ...]  # device types it serves; empty: all
    unsupported: Unsupported
    slower: Unsupported = lambda dtype, **facts: []  # why one behind it is expected to be faster


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


_backends: dict[str, list[Backend]] = {}
Memory = dict[tuple[Any, ...], str]
_verdicts: Memory = {}
_memories: list[Memory] = [_verdicts]
_forced: str | None = settings.forced_backend()
_recording: list[Verdict] | None = None


def register(stem: str, *backends: Backend) -> None:
    """Declares an operator's backends, best first; "reference" is added last."""
    _backends[stem] = [*backends, Backend("reference", (), lambda dtype, **facts: [])]


def stems() -> list[str]:
    """All operators."""
    return sorted(_backends)


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


def _decide(stem: str, device: str, dtype: torch.dtype, facts: dict[str, Any]) -> Verdict:
    refused: dict[str, Reasons] = {}
    able: list[str] = []
    chosen = ""
    for backend in _backends[stem]:
        reasons = absent(stem, backend, device) or backend.unsupported(dtype, **facts)
        if not reasons:
            able.append(backend.name)
            reasons = backend.slower(dtype, **facts)
        if reasons:
            refused[backend.name] = reasons
        chosen = chosen or ("" if reasons else backend.name)
    if _forced is not None:
        if _forced not in able:
            why = "; ".join(refused.get(_forced, ["this operator has no such implementation"]))
            raise RuntimeError(f"{stem}: backend {_forced!r} is forced but cannot run: {why}")
        chosen = _forced
        refused.pop(chosen, None)
    idle = [name for name in able if name != chosen and name not in refused]
    return Verdict(stem, device, dtype, dict(facts), chosen, refused, idle)


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
