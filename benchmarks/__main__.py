"""`python -m benchmarks`: every operator against PyTorch on this machine, in a few minutes."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import case as cases
from benchmarks import driver, machine, results_file
from benchmarks.driver import Outcome

EXAMPLE = """example:
  python -m benchmarks                          everything; writes benchmarks/results/...
  python -m benchmarks --op rope --compile      one operator, torch.compile as a further peer
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen cases, prints the table as it grows, and writes the result file."""
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    allocator = machine.use_allocator(keep=args.allocator != "system")
    facts = machine.machine()
    chosen = [c for c in cases.load(args.op or cases.OPS) if args.filter in c.id]
    if args.large:
        chosen = [c for c in chosen if c.large]
    if not chosen:
        print(f"no case matches {args.filter!r}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    print(
        f"{facts['cpu']}, {torch.get_num_threads()} threads, {facts['isa'] or 'no native kernels'}"
    )
    print(f"torch {torch.__version__}, {allocator}")
    limits = machine.probe(args.realtime)
    levels = ", ".join(f"{name} {gbs:.0f} GB/s" for name, _, gbs in limits.bandwidth)
    peaks = ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in limits.gflops.items())
    print(f"reached by PyTorch here: {levels}; {peaks}\n", flush=True)

    outcomes = _run(chosen, limits, args)
    records = {outcome.case.id: outcome.record() for outcome in outcomes}
    print("\n" + summary(outcomes))
    if args.allocator == "both" and "mallopt" in allocator:
        again = [o.case for o in outcomes if o.case.large and o.status == "timed"]
        for record in _under_plain_malloc(again, argv):
            kept = ("times_us", "ratios", "status", "note")
            records[record["id"]]["plain_malloc"] = {k: record[k] for k in kept if k in record}
    print(f"{time.perf_counter() - started:.0f} s", flush=True)

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
            "realtime": args.realtime,
            "seconds_per_case": args.seconds,
            "environment": {k: v for k, v in os.environ.items() if k.startswith("FASTLM_")},
        },
        "limits": {
            "bandwidth_gbs": {name: round(gbs, 1) for name, _, gbs in limits.bandwidth},
            "gflops": {name: round(peak, 1) for name, peak in limits.gflops.items()},
        },
        "cases": list(records.values()),
    }
    whole = not (args.op or args.filter or args.quick or args.large)
    if args.out or whole:
        path = args.out or results_file.FOLDER / machine.slug(facts) / (
            f"{now:%Y-%m-%d}-{content['commit']}.json"
        )
        results_file.write(path, content)
        if not args.large:
            print(f"written: {path}")
    return 1 if any(o.status in ("wrong", "error") for o in outcomes) else 0


def _run(
    chosen: Sequence[cases.Case], limits: machine.Limits, args: argparse.Namespace
) -> list[Outcome]:
    outcomes = []
    for number, case in enumerate(chosen, 1):
        outcome = driver.run(
            case,
            limits,
            seconds=args.seconds,
            compiled=args.compile,
            reference=bool(args.op),
            realtime=args.realtime,
        )
        outcomes.append(outcome)
        print(f"[{number:3}/{len(chosen)}] {line(outcome)}", flush=True)
    return outcomes


def _under_plain_malloc(again: Sequence[cases.Case], argv: Sequence[str]) -> list[dict]:
    """The records of the large cases from a process that leaves the allocator as it is."""
    if not again:
        return []
    print("\nThe large ones once more, with malloc as it is:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "large.json"
        more = ["--allocator", "system", "--large", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "benchmarks", *argv, *more], cwd=machine.ROOT)
        wanted = {case.id for case in again}
        records = results_file.read(out)["cases"] if out.exists() else []
        return [record for record in records if record["id"] in wanted]


def line(outcome: Outcome) -> str:
    """One case in one line."""
    case = outcome.case
    head = f"{case.op:20} {case.shape:32} {case.direction:7} {case.dtype}  "
    if outcome.status != "timed":
        return f"{head}{outcome.status.upper()}: {outcome.note}"
    ours = outcome.times["ours"]
    text = f"{head}{duration(ours.median)} ±{(ours.p75 - ours.p25) / 2 / ours.median:4.0%}"
    for name, ratio in outcome.ratios.items():
        text += f"  {ratio:6.2f}x {name} ({duration(outcome.times[name].median).strip()})"
    if outcome.floor_us:
        text += f"  {outcome.floor_us / ours.median:4.0%} of the floor"
    return text + ("" if outcome.backend == "cpu" else f"  [{outcome.backend}]")


def duration(us: float) -> str:
    """Microseconds for a reader."""
    return f"{us / 1000:7.2f} ms" if us >= 1000 else f"{us:7.1f} us"


def summary(outcomes: Sequence[Outcome]) -> str:
    """How the cases went: means, and every loss; a clear one where the quartiles do not overlap."""
    timed = [o for o in outcomes if o.status == "timed"]
    lines = []
    for name in dict.fromkeys(n for o in timed for n in o.ratios):
        ratios = [o.ratios[name] for o in timed if name in o.ratios]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"{len(ratios)} cases against {name}: geometric mean {mean:.2f}x")
        for o in timed:
            if o.ratios.get(name, 1.0) < 1.0:
                clear = o.times["ours"].p25 > o.times[name].p75
                verdict = "slower than" if clear else "within the noise of"
                lines.append(f"  {verdict} {name}: {o.case.id} {o.ratios[name]:.2f}x")
    for status, meaning in (
        ("reference", "cases have no kernel of their own here and were not timed"),
        ("wrong", "cases gave a wrong result and were not timed"),
        ("error", "cases failed and were not timed"),
    ):
        count = sum(o.status == status for o in outcomes)
        if count:
            lines.append(f"{count} {meaning}")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--op", action="append", choices=cases.OPS, help="only this operator (repeatable)")
    add("--filter", default="", help="only cases whose id contains this text")
    add("--out", type=Path, help="where to write the results (partial runs write only if given)")
    add("--quick", action="store_true", help="the same as --seconds 0.25")
    add("--compile", action="store_true", help="torch.compile as a further peer (slow)")
    add("--seconds", type=float, default=0.6, help="timing per case (default 0.6)")
    add("--threads", type=int, help="threads of PyTorch and of the kernels")
    add(
        "--allocator",
        choices=("both", "keep", "system"),
        default="both",
        help="keep: freed memory stays with the process, for all that is timed; system: malloc as "
        "it is; both: keep, and the large cases again as it is (default)",
    )
    add("--large", action="store_true", help="only the cases where the allocator matters")
    add(
        "--realtime",
        action="store_true",
        help="raise the priority during samples: for machines with other work (needs root)",
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds = min(args.seconds, 0.25)
    return args


if __name__ == "__main__":
    sys.exit(main())
