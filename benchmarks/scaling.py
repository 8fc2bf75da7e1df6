"""`python -m benchmarks.scaling`: time against sequence length, batch, width, heads and threads.

Each curve changes one number and leaves the others; ours and the peers take turns at every point.
Results are checked against float64 up to the size where the oracle needs too much memory; larger
points run the same code. Writes a result file of kind "scaling" and draws it.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import custom, driver, machine, results_file
from .case import Case
from .page import COLORS, OTHER

CHECKED = 5e9  # operations up to which a point is checked
EXAMPLE = """example:
  python -m benchmarks.scaling                       all curves; writes benchmarks/results/...
  python -m benchmarks.scaling --only attention      those whose name contains a text
"""


@dataclass(frozen=True)
class Curve:
    """One operator with one number of its shape left open."""

    op: str
    shape: str  # of benchmarks.custom, with {} for what changes
    axis: str  # what that is
    values: tuple[int, ...]
    backward: bool = False

    @property
    def name(self) -> str:
        """For titles and selection."""
        return f"{self.op} {self.shape.format('N')} {'fwd+bwd' if self.backward else 'fwd'}"


def _powers(low: int, high: int, step: int = 2) -> tuple[int, ...]:
    values = [low]
    while values[-1] * step <= high:
        values.append(values[-1] * step)
    return tuple(values)


CURVES = (
    Curve("attention", "1x2x2x{}x64", "tokens", _powers(64, 32768)),
    Curve("attention", "1x2x2x{}x64", "tokens", _powers(64, 8192), backward=True),
    Curve("attention", "{}x4x4x256x64", "batch", _powers(1, 32)),
    Curve("attention", "1x{}x4x512x64", "query heads", _powers(4, 32)),
    Curve("attention", "1x8x8x512x{}", "head size", (16, 32, 64, 96, 128, 192, 256)),
    Curve("decode_attention", "1x8x2x{}x64", "keys", _powers(64, 32768)),
    Curve("decode_attention", "{}x8x2x1024x64", "batch", _powers(1, 32)),
    Curve("rms_norm", "1024x{}", "width", _powers(64, 16384)),
    Curve("rms_norm", "{}x768", "rows", _powers(1, 16384, 4), backward=True),
    Curve("layer_norm", "1024x{}", "width", _powers(64, 16384)),
    Curve("rope", "1x{}x16x4x64", "tokens", _powers(1, 8192, 4)),
    Curve("activation", "{}x4096", "rows", _powers(1, 4096, 4)),
    Curve("linear", "{}x768x2048", "rows", _powers(1, 1024)),
    Curve("feed_forward", "{}x576x1536", "rows", _powers(1, 512)),
    Curve("cross_entropy", "256x{}", "classes", _powers(256, 131072, 4), backward=True),
    Curve("linear_cross_entropy", "{}x288x32000", "rows", _powers(16, 1024, 4), backward=True),
    Curve("quantized_linear", "{}x2048x2048", "rows", _powers(1, 16)),
    Curve("sample", "1x{}", "classes", _powers(1024, 131072, 4)),
)
THREADED = ("attention", "linear", "rms_norm", "cross_entropy")  # drawn against threads as well


def points(curve: Curve, dtype: str) -> list[Case]:
    """The cases of a curve, in order."""
    return [
        case
        for value in curve.values
        for case in custom.cases(curve.op, curve.shape.format(value))
        if case.dtype == dtype and case.backward == curve.backward
    ]


def measure(curve: Curve, dtype: str, seconds: float, realtime: bool) -> dict:
    """The curve's record: microseconds of every implementation at every value."""
    times: dict[str, list[float | None]] = {}
    notes = []
    for index, case in enumerate(points(curve, dtype)):
        outcome = driver.run(
            case,
            None,
            seconds=seconds,
            reference=True,
            realtime=realtime,
            check=case.flops <= CHECKED,
        )
        if outcome.status != "timed":
            notes.append(f"{case.shape}: {outcome.note}")
        for name in outcome.times:
            times.setdefault(name, [None] * len(curve.values))
            times[name][index] = round(outcome.times[name].median, 2)
    facts = {"op": curve.op, "name": curve.name, "axis": curve.axis, "dtype": dtype}
    return {**facts, "values": list(curve.values), "times_us": times, "notes": notes}


def by_threads(curve: Curve, dtype: str, seconds: float, realtime: bool) -> dict:
    """One size of a curve against the number of threads."""
    before = torch.get_num_threads()
    case = points(curve, dtype)[len(curve.values) // 2]
    values = [n for n in _powers(1, 1024) if n <= before]
    times: dict[str, list[float | None]] = {}
    try:
        for index, threads in enumerate(values):
            torch.set_num_threads(threads)
            outcome = driver.run(case, None, seconds=seconds, reference=True, realtime=realtime)
            for name in outcome.times:
                times.setdefault(name, [None] * len(values))
                times[name][index] = round(outcome.times[name].median, 2)
    finally:
        torch.set_num_threads(before)
    name = f"{curve.op} {case.shape} {case.direction}"
    facts = {"op": curve.op, "name": name, "axis": "threads", "dtype": dtype}
    return {**facts, "values": values, "times_us": times, "notes": []}


def draw(content: dict, path: Path) -> None:
    """One panel per curve, logarithmic; solid fp32, dashed bf16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[dict]] = {}
    for curve in content["curves"]:
        panels.setdefault((curve["name"], curve["axis"]), []).append(curve)
    columns = 4
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for place in list(grid.flat)[len(panels) :]:
        place.set_axis_off()
    for place, ((name, axis), curves) in zip(grid.flat, panels.items(), strict=False):
        for curve in curves:
            for who, times in curve["times_us"].items():
                there = [(v, t) for v, t in zip(curve["values"], times, strict=True) if t]
                place.plot(
                    *zip(*there, strict=True),
                    marker=".",
                    color=COLORS.get(who, OTHER),
                    linestyle="-" if curve["dtype"] == "fp32" else "--",
                    label=f"{who} {curve['dtype']}",
                )
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        place.set_title(name, fontsize=8, loc="left")
        place.set_xlabel(axis, fontsize=8)
        place.set_ylabel("µs", fontsize=8)
        place.tick_params(labelsize=7)
        place.grid(color="#e4e8ec")
        place.spines[["top", "right"]].set_visible(False)
        place.legend(fontsize=6, frameon=False)
    facts = content["machine"]
    figure.suptitle(
        f"{facts['cpu']} ({facts['isa']}), {content['settings']['threads']} threads, torch "
        f"{content['versions']['torch']}, {content['settings']['allocator']}, "
        f"{content['date'][:10]}, commit {content['commit']}",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    results_file.write_with(path, lambda to: figure.savefig(to, dpi=110, format="png"))
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen curves and writes the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="curves whose name contains this text")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=0.15, help="of timing per point")
    parser.add_argument("--realtime", action="store_true", help="as in python -m benchmarks")
    parser.add_argument("--out", type=Path, help="the JSON file; the picture stands beside it")
    args = parser.parse_args(argv)
    curves = [curve for curve in CURVES if args.only in curve.name]
    if not curves:
        print(f"no curve's name contains {args.only!r}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    allocator = machine.use_allocator(keep=True)
    records = []
    for curve in curves:
        for dtype in args.dtype:
            runs = [measure(curve, dtype, args.seconds, args.realtime)]
            first = curve is next(c for c in CURVES if c.op == curve.op)
            if curve.op in THREADED and first:
                runs.append(by_threads(curve, dtype, args.seconds, args.realtime))
            for record in runs:
                records.append(record)
                ratios = [
                    f"{e / o:.2f}" if o and e else "-"
                    for o, e in zip(
                        record["times_us"].get("ours", []),
                        record["times_us"].get("eager", []),
                        strict=True,
                    )
                ]
                clock = f"[{time.perf_counter() - start:4.0f} s]"
                against = f"{record['axis']} {record['values'][0]} to {record['values'][-1]}"
                print(
                    f"{clock} {record['name']} {dtype}, {against}: {' '.join(ratios)}", flush=True
                )
                for note in record["notes"]:
                    print(f"         {note}")
    facts, now = machine.machine(), datetime.datetime.now(datetime.timezone.utc)
    content = {
        "kind": "scaling",
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": facts,
        "versions": machine.versions(),
        "settings": {"threads": torch.get_num_threads(), "allocator": allocator},
        "curves": records,
    }
    path = args.out or results_file.FOLDER / machine.slug(facts) / (
        f"{now:%Y-%m-%d}-{content['commit']}-scaling.json"
    )
    results_file.write(path, content)
    draw(content, path.with_suffix(".png"))
    print(f"written: {path} and its .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
