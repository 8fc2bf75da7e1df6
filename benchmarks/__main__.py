"""`python -m benchmarks`: every operator against PyTorch on this machine, in a few minutes."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import case as cases
from . import machine, results_file, session

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
    chosen = [c for c in cases.load(args.op or cases.OPS) if args.filter in c.id]
    if args.large:
        chosen = [c for c in chosen if c.large]
    if not chosen:
        print(f"no case matches {args.filter!r}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    plan = session.Plan(
        seconds=args.seconds,
        compiled=args.compile,
        reference=bool(args.op),
        realtime=args.realtime,
        keep=args.allocator != "system",
        again=args.again,
    )
    content, outcomes = session.measure(chosen, plan, say)
    print("\n" + session.summary(outcomes))
    if args.allocator == "both" and "mallopt" in content["settings"]["allocator"]:
        again = [o.case for o in outcomes if o.case.large and o.status == "timed"]
        records = {record["id"]: record for record in content["cases"]}
        for record in _under_plain_malloc(again, argv):
            kept = ("times_us", "ratios", "status", "note")
            records[record["id"]]["plain_malloc"] = {k: record[k] for k in kept if k in record}
    print(f"{time.perf_counter() - started:.0f} s", flush=True)

    whole = not (args.op or args.filter or args.quick or args.large)
    if args.out or whole:
        path = args.out or results_file.FOLDER / machine.slug(content["machine"]) / (
            f"{content['date'][:10]}-{content['commit']}.json"
        )
        results_file.write(path, content)
        if not args.large:
            print(f"written: {path}")
    return 1 if any(o.status in ("wrong", "error") for o in outcomes) else 0


def say(text: str) -> None:
    """A line at once, also into a file."""
    print(text, flush=True)


def _under_plain_malloc(again: Sequence[cases.Case], argv: Sequence[str]) -> list[dict]:
    """The records of the large cases from a process that leaves the allocator as it is."""
    if not again:
        return []
    print("\nThe large ones once more, with malloc as it is:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "large.json"
        more = ["--allocator", "system", "--large", "--out", str(out)]
        subprocess.run([sys.executable, "-m", __package__, *argv, *more], cwd=machine.ROOT)
        wanted = {case.id for case in again}
        records = results_file.read(out)["cases"] if out.exists() else []
        return [record for record in records if record["id"] in wanted]


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
    add(
        "--again",
        type=int,
        default=2,
        metavar="N",
        help="cases whose samples spread widely are timed up to N times more, at the end; the "
        "calmest round counts (default 2)",
    )
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
