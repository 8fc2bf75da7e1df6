"""The matrix product on a CPU: fastlm's own kernel or PyTorch's library, whichever is faster here.

Up to 16 rows the own kernel wins everywhere. Beyond, processors differ: MKL takes a generic path on
AMD, Intel has tile units for bf16. So the first product of more rows measures both once (about
0.1 s, cached for the process and its thread count). FASTLM_BACKEND=cpu or torch leaves no choice,
and where `fastlm tune` has measured the very class of calls, its verdict counts instead.

PyTorch also carries oneDNN's fp32 linear (torch.ops.mkldnn._linear_pointwise). It is not used: it
adds up all of k in one chain, with 2 to 4 times the error of F.linear, which is over the budget,
and the own kernel is about as fast.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import _ext
from fastlm.ops import _measured
from fastlm.ops._library import define
from fastlm.ops._registry import forget

FEW = 16  # rows up to which the weights' traffic decides, not the arithmetic
SOME, MANY = 64, 256  # rows at which both are measured
_SIDE = 1024  # of the measured weight; with 512, tile units are only half as fast as they get
_ROUNDS, _BUDGET_S = 9, 0.15  # the second ends the measurement early on a loaded machine
_MARGIN = 0.97  # the own kernel must be at least this much faster, so that noise decides less


def _fake(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


own = define("linear(Tensor x, Tensor w, Tensor? bias) -> Tensor", _fake)


@dataclass(frozen=True)
class Winners:
    """Where fastlm's own kernel beats PyTorch's product, for one element type and thread count."""

    some: bool  # 17 to 64 rows
    many: bool  # more
    grad_x: bool  # gradients of many rows
    grad_w: bool
    text: str


_NONE = Winners(False, False, False, False, "not measured while compiling")


def winners(dtype: torch.dtype) -> Winners:
    """What was measured for this element type on the CPU."""
    if torch.compiler.is_compiling():
        return _NONE  # F.linear, which the compiler knows
    if type(torch.empty(0)) is not Tensor:  # a mode that stands in for tensors is on
        return _NONE
    return _fixed.get(dtype) or _measure(dtype, torch.get_num_threads())


_fixed: dict[torch.dtype, Winners] = {}


@contextlib.contextmanager
def fixed(
    table: Mapping[torch.dtype, Winners], tuned: _measured.Verdicts | None = None
) -> Iterator[None]:
    """Inside, these verdicts stand in place of a measurement, and `tuned` for the tuned table.

    A measurement may come out otherwise the next time, and the two kernels differ in the last bits:
    what must repeat bit for bit keeps its verdicts and brings them back.
    """
    before = dict(_fixed)
    _fixed.update(table)
    forget()
    try:
        with _measured.fixed(tuned or {}):
            yield
    finally:
        _fixed.clear()
        _fixed.update(before)
        forget()


def grad_x(grad: Tensor, w: Tensor) -> Tensor:
    """grad w for grad [rows, N] and w [N, K]."""
    if _own_gradients(grad) and winners(grad.dtype).grad_x:
        return own(grad, w.t(), None)
    return grad.mm(w)


def grad_w(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x for grad [rows, N] and x [rows, K]."""
    if _own_gradients(grad) and winners(grad.dtype).grad_w:
        return own(grad.t(), x.t(), None)
    return grad.t().mm(x)


def _own_gradients(grad: Tensor) -> bool:
    return (
        grad.is_cpu
        and (grad.shape[0] > SOME or grad.dtype == torch.float16)  # its mm is far behind
        and grad.dtype != torch.float64
        and not torch.is_grad_enabled()  # the own kernel has no second derivative
    )


@functools.cache
def _measure(dtype: torch.dtype, threads: int) -> Winners:
    if _ext.native is None:
        return Winners(False, False, False, False, "no native kernels")
    # ones, not random numbers: the user's random state stays as it is
    w = torch.ones(_SIDE, _SIDE, dtype=dtype, device="cpu")
    some, many = w[:SOME], w[:MANY]
    grad = torch.ones_like(many)
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("some", "own"): lambda: own(some, w, None),
        ("some", "torch"): lambda: F.linear(some, w),
        ("many", "own"): lambda: own(many, w, None),
        ("many", "torch"): lambda: F.linear(many, w),
        ("grad_x", "own"): lambda: own(grad, w.t(), None),
        ("grad_x", "torch"): lambda: grad.mm(w),
        ("grad_w", "own"): lambda: own(grad.t(), many.t(), None),
        ("grad_w", "torch"): lambda: grad.t().mm(many),
    }
    with torch.no_grad():
        for call in calls.values():  # first calls compile and allocate
            call()
        times = dict.fromkeys(calls, float("inf"))
        end = time.perf_counter() + _BUDGET_S
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name] = min(times[name], time.perf_counter() - start)
            if time.perf_counter() > end:
                break
    won = {task: times[task, "own"] < _MARGIN * times[task, "torch"] for task, _ in calls}
    text = f"measured once with {_SIDE}x{_SIDE} weights and {threads} threads"
    for rows, task in ((SOME, "some"), (MANY, "many")):
        mine, its = times[task, "own"] * 1e3, times[task, "torch"] * 1e3
        text += f", {rows} rows: own {mine:.2f} ms, F.linear {its:.2f}"
    return Winners(won["some"], won["many"], won["grad_x"], won["grad_w"], text)
