"""One run over many cases: limits first, then case by case, then the content of a result file."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastlm.ops import _measured

from . import driver, machine
from .case import Case
from .driver import Outcome

Say = Callable[[str], None]
SPREAD = 0.12  # of a case's samples, above which the machine was too busy to believe them


@dataclass(frozen=True)
class Plan:
    """How a run is made."""

    seconds: float = 0.6  # of timing per case
    compiled: bool = False  # torch.compile as a further peer
    reference: bool = False  # operators without a kernel of their own here are timed too
    realtime: bool = False
    keep: bool = True  # glibc keeps freed memory, for all that is timed
    budget: float = math.inf  # seconds after which no further case begins; operators share them
    again: int = 0  # times that cases with widely spread samples are timed once more, at the end


def measure(cases: Sequence[Case], plan: Plan, say: Say) -> tuple[dict, list[Outcome]]:
    """Runs the cases; `say` gets each line of the table as it grows.

    Returns:
        The content of a result file of kind "ops", and the outcomes. Cases for which the budget
        was spent have the status "skipped": an operator's cases end with its share of it, so that
        the slow cases of one do not crowd out the next.
    """
    started = time.perf_counter()
    allocator = machine.use_allocator(keep=plan.keep)
    facts = machine.machine()
    isa = facts["isa"] or "no native kernels"
    say(f"{facts['cpu']}, {torch.get_num_threads()} threads, {isa}")
    say(f"torch {torch.__version__}, {allocator}")
    limits = machine.probe(plan.realtime)
    levels = ", ".join(f"{name} {gbs:.0f} GB/s" for name, _, gbs in limits.bandwidth)
    peaks = ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in limits.gflops.items())
    say(f"reached by PyTorch here: {levels}; {peaks}\n")

    ends = {case.op: plan.budget * n / len(cases) for n, case in enumerate(cases, 1)}

    def run(case: Case) -> Outcome:
        if time.perf_counter() - started > ends[case.op]:
            return Outcome(case, "skipped", "the time was up")
        return driver.run(
            case,
            limits,
            seconds=plan.seconds,
            compiled=plan.compiled,
            reference=plan.reference,
            realtime=plan.realtime,
        )

    outcomes = []
    for number, case in enumerate(cases, 1):
        outcomes.append(run(case))
        if outcomes[-1].status != "skipped":
            say(f"[{number:3}/{len(cases)}] {line(outcomes[-1])}")
    for round_ in range(2, plan.again + 2):
        restless = [i for i, o in enumerate(outcomes) if o.spread > SPREAD]
        if restless:
            say(f"\n{len(restless)} cases spread by more than {SPREAD:.0%}, timed again:")
        for i in restless:
            outcomes[i] = calmest(outcomes[i], run(outcomes[i].case), round_)
            say(f"[{i + 1:3}/{len(cases)}] {line(outcomes[i])}")

    now = datetime.datetime.now(datetime.timezone.utc)
    content = {
        "kind": "ops",
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": facts,
        "versions": machine.versions(),
        "settings": {
            "threads": torch.get_num_threads(),
            "allocator": allocator,
            "realtime": plan.realtime,
            "seconds_per_case": plan.seconds,
            "rounds_at_most": plan.again + 1,
            "tuned": _tuned(),
            "environment": {k: v for k, v in os.environ.items() if k.startswith("FASTLM_")},
        },
        "limits": {
            "bandwidth_gbs": {name: round(gbs, 1) for name, _, gbs in limits.bandwidth},
            "gflops": {name: round(peak, 1) for name, peak in limits.gflops.items()},
        },
        "cases": [outcome.record() for outcome in outcomes],
    }
    return content, outcomes


def calmest(one: Outcome, other: Outcome, rounds: int) -> Outcome:
    """Of two rounds of a case the one whose samples spread less, whatever they say."""
    better = other if other.status == "timed" and other.spread < one.spread else one
    better.rounds = rounds
    return better


def _tuned() -> int:
    """How many classes of calls `fastlm tune` has measured here: they may be chosen otherwise."""
    measured = _measured.verdicts("cpu").values()
    return sum(len(classes) for facts in measured for classes in facts.values())


def line(outcome: Outcome) -> str:
    """One case in one line."""
    case = outcome.case
    head = f"{case.op:20} {case.shape:32} {case.direction:7} {case.dtype}  "
    if outcome.status != "timed":
        return f"{head}{outcome.status.upper()}: {outcome.note}"
    ours = outcome.times["ours"]
    text = f"{head}{duration(ours.median)} ±{ours.spread:4.0%}"
    for name, ratio in outcome.ratios.items():
        text += f"  {ratio:6.2f}x {name} ({duration(outcome.times[name].median).strip()})"
    if outcome.floor_us:
        text += f"  {outcome.floor_us / ours.median:4.0%} of the floor"
    return text + ("" if outcome.backend == "cpu" else f"  [{outcome.backend}]")


def duration(us: float) -> str:
    """Microseconds for a reader."""
    return f"{us / 1000:7.2f} ms" if us >= 1000 else f"{us:7.1f} us"


def geometric_mean(ratios: Sequence[float]) -> float:
    """Of positive numbers, at least one."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def summary(outcomes: Sequence[Outcome]) -> str:
    """How the cases went: means, and every loss; a clear one where the quartiles do not overlap."""
    timed = [o for o in outcomes if o.status == "timed"]
    lines = []
    for name in dict.fromkeys(n for o in timed for n in o.ratios):
        ratios = [o.ratios[name] for o in timed if name in o.ratios]
        mean = geometric_mean(ratios)
        lines.append(f"{len(ratios)} cases against {name}: geometric mean {mean:.2f}x")
        for o in timed:
            if o.ratios.get(name, 1.0) < 1.0:
                clear = o.times["ours"].p25 > o.times[name].p75
                verdict = "slower than" if clear else "within the noise of"
                lines.append(f"  {verdict} {name}: {o.case.id} {o.ratios[name]:.2f}x")
    if theirs := sum(o.backend == "torch" for o in timed):
        lines.append(f"{theirs} cases ran PyTorch's own kernels, chosen as the faster ones")
    for status, meaning in (
        ("reference", "cases have no kernel of their own here and were not timed"),
        ("wrong", "cases gave a wrong result and were not timed"),
        ("error", "cases failed and were not timed"),
        ("skipped", "cases were left out: the time was up"),
    ):
        count = sum(o.status == status for o in outcomes)
        if count:
            lines.append(f"{count} {meaning}")
    return "\n".join(lines)
