"""Counts the instructions of representative CPU kernels (AVX2), which a busy machine cannot blur.

    python tools/instructions.py                  compares with tests/instructions.json
    python tools/instructions.py --write          takes today's counts as the new baseline
    python tools/instructions.py --against main   builds that commit too and compares with it

Needs valgrind (callgrind) and built kernels. Counts depend on the compiler, so a baseline is only
good for the version that is written in it; --against works with any.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "tests" / "instructions.json"
SOURCE = ROOT / "tools" / "instructions.cpp"
ALLOWED = 0.01  # growth, as a fraction
STEMS = (
    *("rms_norm", "layer_norm", "activation", "rope"),
    *("attention", "decode_attention", "linear", "cross_entropy"),
)


class Unavailable(Exception):
    """Why nothing can be counted here."""


def compiler() -> list[str]:
    """The C++ compiler, as the build takes it."""
    return os.environ.get("CXX", "g++").split()


def version() -> str:
    """The compiler's first line about itself."""
    run = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[0]


def count(root: Path) -> dict[str, int]:
    """Instructions of every measured function with the kernels built in a tree.

    Raises:
        Unavailable: no valgrind, or no AVX2 kernels.
    """
    if shutil.which("valgrind") is None:
        raise Unavailable("valgrind is not installed")
    folders = sorted(root.glob("build/native-*"), key=lambda f: f.stat().st_mtime)
    objects = [folders[-1] / f"{stem}.avx2.o" for stem in STEMS] if folders else []
    if not objects or not all(file.is_file() for file in objects):
        raise Unavailable(f"no AVX2 kernels are built in {root}: make build")
    with tempfile.TemporaryDirectory() as temporary:
        program, out = Path(temporary) / "instructions", Path(temporary) / "callgrind"
        includes = f"-I{root / 'csrc'}"
        command = [*compiler(), "-std=c++20", "-O1", "-g0", includes, SOURCE, *objects]
        _run([*command, "-o", program])
        _run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={out}",
                "--collect-atstart=no",
                "--toggle-collect=measured_*",
                "--compress-strings=no",
                program,
            ]
        )
        return inclusive(out.read_text())


def _run(command: Sequence[object]) -> None:
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{run.stdout}{run.stderr}")


def inclusive(profile: str) -> dict[str, int]:
    """What the measured functions and all they called cost, from callgrind's file."""
    counts: dict[str, int] = {}
    name = ""
    for line in profile.splitlines():
        if line.startswith("fn="):
            name = line.removeprefix("fn=")
        elif name.startswith("measured_") and (cost := re.fullmatch(r"[+*-]?\d* (\d+)", line)):
            key = name.removeprefix("measured_")
            counts[key] = counts.get(key, 0) + int(cost[1])
    return counts


def compare(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[str, bool]:
    """A table, and whether nothing has grown beyond what is allowed or is missing."""
    lines, good = [], True
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(f"{name:24} {'no baseline' if old is None else 'NOT COUNTED'}")
            good = good and new is not None
            continue
        change = new / old - 1
        worse = change > ALLOWED
        good = good and not worse
        lines.append(f"{name:24} {old:12,} {new:12,} {change:+7.1%}{'  MORE' if worse else ''}")
    return "\n".join(lines), good


def main(argv: Sequence[str] | None = None) -> int:
    """Counts, then writes or compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="make these counts the baseline")
    parser.add_argument("--against", metavar="COMMIT", help="compare with a commit, built beside")
    args = parser.parse_args(argv)
    try:
        counts = count(ROOT)
        if args.write:
            content = {"compiler": version(), "counts": counts}
            temporary = BASELINE.with_suffix(".new")
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            temporary.replace(BASELINE)
            print(f"written: {BASELINE}")
            return 0
        if args.against:
            before = _elsewhere(args.against)
        else:
            baseline = json.loads(BASELINE.read_text())
            if baseline["compiler"] != version():
                raise Unavailable(
                    f"the baseline is of {baseline['compiler']}, here is {version()}: "
                    "compare with a commit by --against"
                )
            before = baseline["counts"]
    except (Unavailable, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 2
    table, good = compare(before, counts)
    print(table)
    if not good:
        print("\nMore than before. If that is meant: python tools/instructions.py --write")
    return 0 if good else 1


def _elsewhere(commit: str) -> dict[str, int]:
    """The counts of another commit."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        git = ["git", "-C", ROOT, "worktree"]
        _run([*git, "add", "--detach", tree, commit])
        try:
            environment = {**os.environ, "FASTLM_CUDA": "0"}
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, env=environment, check=True, stdout=sys.stderr)
            return count(tree)
        finally:
            _run([*git, "remove", "--force", tree])


if __name__ == "__main__":
    sys.exit(main())
