"""Times configurations of the Triton kernels on the GPU that is here and writes the best ones.

    python tools/tune.py                          # every table, into fastlm/triton/tuned.json
    python tools/tune.py --only norm+rope --dry-run
    python tools/tune.py --only attention --dtype float16 --seconds 1 --out /tmp/tuned.json

For each table of fastlm/triton/_configs.py and each of its size classes the neighbours of the
configuration that stands there run in their operator, in turns. One that does not compile, or whose
result is not within the error budget against float64, is out; one that is faster by more than 2 %
takes the place. Nothing is tuned at run time: the file that is written is read with the package.
Exit status: 0 written, 1 a configuration in use is wrong, 2 a wrong argument, 3 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tune_cases import CASES, Case

from fastlm.ops import use_backend
from fastlm.testing import check
from fastlm.triton import _configs
from fastlm.triton._configs import ANY, LIBRARY, Config, override

ROOT = Path(__file__).resolve().parent.parent

MARGIN = 0.98  # of the time of what stands there, so that noise moves nothing
MOST_WARPS = 32
DRAWS: int | None = None  # of a check: as many as its tensors need

# seconds of each labelled call, called in turns
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclass(frozen=True)
class Class:
    """One row of one table."""

    name: str
    bound: int
    config: Config
    size: int  # that is timed
    own: tuple[Config, ...]  # all of the table but the library

    def __str__(self) -> str:
        return self.name + ("" if self.bound == ANY else f" up to {self.bound}")


def classes(only: Sequence[str], arch: str) -> list[Class]:
    """The rows of all tables whose name contains one of some words (all without words)."""
    found = []
    for name in CASES:
        if only and not any(word in name for word in only):
            continue
        before, own = 0, tuple(c for _, c in _configs.rows(name, arch) if c.tile)
        for bound, config in _configs.rows(name, arch):
            size = bound if bound < ANY else 2 * before or CASES[name].typical
            found.append(Class(name, bound, config, size, own))
            before = bound
    return found


def candidates(row: Class, case: Case, most: int) -> list[Config]:
    """Neighbours of what stands in a row, which comes first; at most so many."""
    here, found = row.config, [row.config]
    if not here.tile:  # the library: neighbours of what stands for smaller sizes
        here = row.own[-1] if row.own else Config((64, 64, 32), 8, 2)
        found.append(here)
    elif row.name.startswith("feed_forward"):
        found.append(LIBRARY)
    first = len(found)
    tiles = [here.tile]
    for n, factor in itertools.product(case.vary, (0.5, 2)):
        changed = list(here.tile)
        changed[n] = int(changed[n] * factor)
        if changed[n] >= min(16, here.tile[n]):
            tiles.append(tuple(changed))
    for tile, warps, stages in itertools.product(tiles, (1, 0.5, 2), (0, 1, -1)):
        config = Config(tile, int(here.warps * warps), here.stages + stages)
        if 1 <= config.warps <= MOST_WARPS and config.stages >= 1 and config not in found:
            found.append(config)
    # one change before two, so that a short list has the nearest
    found[first:] = sorted(found[first:], key=lambda c: _changes(c, here))
    return found[:most]


def _changes(config: Config, here: Config) -> int:
    return sum(a != b for a, b in zip(config, here, strict=True))


def placed(row: Class, case: Case, small: bool, device: str, dtype: torch.dtype) -> list[Any]:
    """The case's tensors on a device, of the table's type."""
    wanted = case.dtype or dtype
    torch.manual_seed(0)
    return [None if x is None else x.to(device, wanted) for x in case.make(row.size, small)]


def wrong(row: Class, case: Case, config: Config, device: str, dtype: torch.dtype) -> str:
    """Why a configuration is out: what the compiler or the check says; empty if nothing."""
    inputs = placed(row, case, True, device, dtype)
    try:
        with use_backend("triton"), override(**{row.name: config}):
            for x in inputs if case.gradients else ():
                x.requires_grad_()
            check(
                case.call, case.baseline, case.oracle, inputs, gradients=case.gradients, draws=DRAWS
            )
    except Exception as error:  # a candidate may fail in any way; the next one is tried
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return ""


def runs(
    row: Class, case: Case, configs: Sequence[Config], device: str, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """A call for each configuration, by its text."""
    inputs = placed(row, case, False, device, dtype)
    for x in inputs if case.gradients else ():
        x.requires_grad_()
    with use_backend("triton"):
        y = case.call(*inputs) if case.timed == "backward" else None
    ones = None if y is None else torch.ones_like(y)

    def made(config: Config) -> Callable[[], object]:
        def run() -> object:
            with use_backend("triton"), override(**{row.name: config}):
                if y is None:
                    return case.call(*inputs)
                return torch.autograd.grad(y, inputs, ones, retain_graph=True)

        return run

    return {text(config): made(config) for config in configs}


def text(config: Config) -> str:
    """ "128x64, 8 warps, 2 stages"."""
    if not config.tile:
        return "library"
    return f"{'x'.join(map(str, config.tile))}, {config.warps} warps, {config.stages} stages"


def tune(
    rows: Sequence[Class],
    timer: Timer,
    device: str,
    dtype: torch.dtype,
    most: int,
    say: Callable[[str], None] = print,
) -> tuple[dict[Class, Config], list[str]]:
    """The best configuration of each row, and complaints about ones that stood there."""
    best: dict[Class, Config] = {}
    complaints = []
    for number, row in enumerate(rows, 1):
        case, able, refused = CASES[row.name], [], 0
        for config in candidates(row, case, most):
            why = wrong(row, case, config, device, dtype)
            if not why:
                able.append(config)
            elif config == row.config:
                complaints.append(f"{row}: {text(config)}, in use, is out: {why}")
            refused += bool(why)
        if not able:
            say(f"[{number}/{len(rows)}] {row}: no configuration is able")
            continue
        times = timer(runs(row, case, able, device, dtype))
        now = times.get(text(row.config), float("inf"))
        first = min(able, key=lambda config: times[text(config)])
        best[row] = first if times[text(first)] < MARGIN * now else row.config
        taken = f"{text(best[row])}, {1e6 * times[text(best[row])]:.1f} us (before {1e6 * now:.1f}"
        say(f"[{number}/{len(rows)}] {row}: {taken}; {len(able)} timed, {refused} out)")
    return best, complaints


def written(best: Mapping[Class, Config], arch: str, about: dict[str, str], file: Path) -> None:
    """Puts an architecture's rows into a file; those of others and of other tables stay."""
    content = json.loads(file.read_text()) if file.exists() else {}
    here = content.setdefault(arch, {"tables": {}})
    here.update(about)
    for name in dict.fromkeys(row.name for row in best):
        chosen = {row.bound: config for row, config in best.items() if row.name == name}
        here["tables"][name] = [
            [None if bound == ANY else bound, *chosen.get(bound, config)]
            for bound, config in _configs.rows(name, arch)
        ]
    _configs.parsed(content, str(file))  # what is written can be read
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as fresh:
        fresh.write(json.dumps(content, indent=1) + "\n")
        fresh.flush()
        os.fsync(fresh.fileno())
    os.replace(fresh.name, file)


def on_gpu(seconds: float) -> Timer:
    """Device times with a cold L2, the variants in turns."""
    from benchmarks.gpu_timing import GpuClock, Variant, interleave

    clock = GpuClock()

    def timer(calls: Mapping[str, Callable[[], object]]) -> Mapping[str, float]:
        variants = {name: Variant(call) for name, call in calls.items()}
        return {n: t.median for n, t in interleave(clock, variants, seconds)[0].items()}

    return timer


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", help="tables whose name contains one of WORD+WORD..")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="except *_fp32")
    add("--most", type=int, default=16, help="configurations of a row at most (16)")
    add("--seconds", type=float, default=0.5, help="of timing a row (0.5)")
    add("--arch", choices=_configs.ARCHITECTURES, help="with --dry-run: whose tables")
    add("--out", type=Path, default=_configs.TUNED, help="the file that is written")
    add("--dry-run", action="store_true", help="list what would be timed; needs no GPU")
    args = parser.parse_args(argv)
    if args.most < 1:
        parser.error(f"--most must be 1 or more, got {args.most}")
    if not args.out.parent.is_dir():
        parser.error(f"--out: {args.out.parent} is no folder")
    able = torch.cuda.is_available()
    arch = args.arch or (_configs.architecture(0) if able else "sm_90")
    rows = classes([word for word in args.only.split("+") if word], arch)
    if not rows:
        parser.error(
            f"--only: no table has a name with {args.only!r}; there are {', '.join(CASES)}"
        )
    if args.dry_run:
        for row in rows:
            found = candidates(row, CASES[row.name], args.most)
            print(f"{row} (size {row.size}): {'; '.join(map(text, found))}")
        return 0
    if not able:
        print("no GPU: tuning needs one; --dry-run lists what would be timed", file=sys.stderr)
        return 3
    if args.arch and args.arch != _configs.architecture(0):
        parser.error(f"--arch: this GPU is {_configs.architecture(0)}, not {args.arch}")
    best, complaints = tune(
        rows, on_gpu(args.seconds), "cuda", getattr(torch, args.dtype), args.most
    )
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    about = {
        "device": torch.cuda.get_device_name(0),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "dtype": args.dtype,
    }
    written(best, arch, about, args.out)
    print(f"written: {args.out}")
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
