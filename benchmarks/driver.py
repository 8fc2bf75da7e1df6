"""Checks a case's result against float64, then times every implementation in turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from fastlm.ops._registry import recording
from fastlm.testing import compare

from .case import Call, Case, Work
from .machine import Limits, cache_size
from .timing import Thunk, Times, interleave

ROTATED = 2**29  # bytes of rotated weights at most
COPIES = 1000  # sets of inputs at most: below some 100 KB a cold case is read from the last cache


@dataclass
class Outcome:
    """What became of a case: "timed", "wrong" (not timed), "error" (not timed) or "reference"."""

    case: Case
    status: str
    note: str = ""
    backend: str = ""
    times: dict[str, Times] = field(default_factory=dict)
    floor_us: float = 0.0
    rounds: int = 1  # how often it was timed; the calmest round is the one here

    @property
    def spread(self) -> float:
        """The widest of its implementations' spreads."""
        return max((t.spread for t in self.times.values()), default=0.0)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as each peer."""
        ours = self.times["ours"].median
        return {name: t.median / ours for name, t in self.times.items() if name != "ours"}

    def record(self) -> dict[str, object]:
        """The JSON form."""
        case = self.case
        facts: dict[str, object] = {
            "id": case.id,
            "op": case.op,
            "shape": case.shape,
            "dtype": case.dtype,
            "direction": case.direction,
            "cold": case.cold,
            "bytes": case.bytes,
            "flops": case.flops,
            "status": self.status,
            "backend": self.backend,
        }
        if self.note:
            facts["note"] = self.note
        if self.rounds > 1:
            facts["rounds"] = self.rounds
        if self.times:
            facts["floor_us"] = _short(self.floor_us)
            facts["times_us"] = {
                name: {key: _short(value) for key, value in asdict(times).items()}
                for name, times in self.times.items()
            }
            facts["ratios"] = {name: _short(ratio) for name, ratio in self.ratios.items()}
            facts["share_of_floor"] = _short(self.floor_us / self.times["ours"].median)
        return facts


def run(
    case: Case,
    limits: Limits | None,
    *,
    seconds: float = 0.6,
    compiled: bool = False,
    reference: bool = False,
    realtime: bool = False,
    check: bool = True,
) -> Outcome:
    """Runs one case. A case whose result is wrong, or that fails, is not timed.

    `compiled` adds torch.compile of the eager function as a peer; `reference` times an operator
    even where only its reference runs; `check=False` is for sizes that the oracle cannot take.
    """
    try:
        work = build(case, 0)
        backend = backends(case, work)
        if backend == "reference" and not reference:
            return Outcome(case, "reference", "no kernel of its own here", backend)
        wrong = problems(case, work) if check else ""
        if wrong:
            return Outcome(case, "wrong", wrong, backend)
        works = [work] + [build(case, copy) for copy in range(1, copies(case))]
        variants = {
            name: [thunk(case, w, pick(w)) for w in works]
            for name, pick in implementations(work, compiled).items()
        }
        with torch.set_grad_enabled(case.backward):
            times = interleave(variants, seconds, realtime=realtime)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        return Outcome(case, "error", f"{type(error).__name__}: {error}")
    floor = limits.floor_us(case.dtype, case.bytes, case.flops, case.cold) if limits else 0.0
    return Outcome(case, "timed", "", backend, times, floor)


def build(case: Case, seed: int) -> Work:
    """The case's inputs and functions, the same for the same seed."""
    torch.manual_seed(seed)
    return case.build()


def backends(case: Case, work: Work) -> str:
    """Which implementation the chooser takes for this case."""
    with recording() as verdicts, torch.no_grad():
        work.ours(*work.inputs)
    names = [v.chosen for v in verdicts if v.stem == case.op] or [v.chosen for v in verdicts]
    return "+".join(dict.fromkeys(names)) or "unknown"


def problems(case: Case, work: Work) -> str:
    """The errors over their budget, or "" for a right result."""
    errors = compare(work.ours, work.eager, work.oracle, list(work.inputs), gradients=case.backward)
    return "; ".join(str(e) for e in errors if not e.ok)


def implementations(work: Work, compiled: bool = False) -> dict[str, Callable[[Work], Call]]:
    """By name: how to find ours and each peer in a built case."""
    found: dict[str, Callable[[Work], Call]] = {
        "ours": lambda w: w.ours,
        "eager": lambda w: w.eager,
    }
    for name in work.peers:
        found[name] = lambda w, name=name: w.peers[name]  # type: ignore[misc]
    if compiled:
        torch._dynamo.reset()
        found["compile"] = lambda w: torch.compile(w.eager, dynamic=False)
    return found


def copies(case: Case) -> int:
    """How many sets of inputs to rotate so that a cold case's weights come from memory."""
    if not case.cold:
        return 1
    wanted = 2 * cache_size(3)
    return max(1, min(math.ceil(wanted / case.bytes), ROTATED // case.bytes, COPIES))


def thunk(case: Case, work: Work, call: Call) -> Thunk:
    """One call, ready to be timed; with the backward, gradients of every floating-point input.

    All implementations get the same cotangents, laid out as PyTorch's own output is.
    """
    if not case.backward:
        inputs = work.inputs
        return lambda: call(*inputs)
    leaves = [
        x.detach().requires_grad_() if x.is_floating_point() else x.detach() for x in work.inputs
    ]
    wanted = [x for x in leaves if x.requires_grad]
    made = work.eager(*work.inputs)
    outputs = made if isinstance(made, tuple) else (made,)
    cotangents = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in outputs]

    def step() -> object:
        made = call(*leaves)
        outputs = made if isinstance(made, tuple) else (made,)
        return torch.autograd.grad(outputs, wanted, cotangents)

    return step


def _short(value: float) -> float:
    """Four significant digits: a stable and readable file."""
    return value if isinstance(value, int) else float(f"{value:.4g}")
