"""Compiles every CUDA kernel for every architecture, without a GPU, and says what each needs.

    python tools/cuda_budget.py            # compare with tests/cuda_budget.json
    python tools/cuda_budget.py --write    # and write it anew: after every change of a kernel
    python tools/cuda_budget.py --only rope

The file holds, per kernel and architecture, the facts of tools/cuda_facts.py in the order of its
FACTS; the first three (registers a thread, bytes spilled, bytes of static shared memory) are the
budget, which may not be exceeded. A seal per file and intermediate code is a digest of the facts
and of all they depend on. Where it holds, nothing is compiled: the facts are those of these very
sources with this compiler. Where it does not (a source, flag or compiler has changed, or somebody
edited a figure), the compiler is asked. FASTLM_RECOMPILE=1, or --anew, always asks it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import cuda_facts  # noqa: E402
from tools.cuda_facts import BUDGETED, FACTS, ByArch  # noqa: E402

BUDGET = ROOT / "tests" / "cuda_budget.json"


def seal(stem: str, archs: tuple[str, ...], facts: ByArch) -> str:
    """A digest of the facts and of what they depend on."""
    rows = {arch: {k: [f[n] for n in FACTS] for k, f in facts[arch].items()} for arch in archs}
    text = f"{cuda_facts.inputs(stem, archs)} {json.dumps(rows, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recorded(stem: str, archs: tuple[str, ...], budget: dict) -> ByArch | None:
    """The facts in the file, where they are those of these sources with this compiler."""
    part = budget.get(stem, {})
    facts: ByArch = {arch: {} for arch in archs}
    for kernel, row in part.get("kernels", {}).items():
        for arch in archs:
            if len(row.get(arch, ())) == len(FACTS):
                facts[arch][kernel] = dict(zip(FACTS, row[arch], strict=True))
    sealed = part.get("sealed", {}).get("-".join(archs))
    return facts if sealed == seal(stem, archs, facts) else None


def facts_of_all(only: str = "", *, anew: bool = False) -> dict[str, ByArch]:
    """{file: {architecture: {kernel: facts}}}: recorded ones, else the compiler's."""
    anew = anew or cuda_facts.asked_anew()
    budget = read()
    tasks = [(stem, archs) for stem in cuda_facts.stems(only) for archs in cuda_facts.groups()]
    known = {} if anew else {task: recorded(*task, budget) for task in tasks}
    made = {task: facts for task, facts in known.items() if facts is not None}
    size = {stem: len(part.get("kernels", ())) for stem, part in budget.items()}
    rest = [task for task in tasks if task not in made]
    rest.sort(key=lambda task: -size.get(task[0], 0) * len(task[1]))  # the longest first
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        fresh = pool.map(lambda task: cuda_facts.measured(*task, anew=anew), rest)
        made.update(zip(rest, fresh, strict=True))
    found: dict[str, ByArch] = {}
    for stem, archs in tasks:
        found.setdefault(stem, {}).update(made[stem, archs])
    return found


def difference(found: dict[str, ByArch], budget: dict) -> list[str]:
    """What needs more than it may; fewer registers are no complaint."""
    complaints = []
    for stem, by_arch in found.items():
        for arch, kernels in by_arch.items():
            for kernel, facts in kernels.items():
                allowed = budget.get(stem, {}).get("kernels", {}).get(kernel, {}).get(arch)
                if allowed is None:
                    complaints.append(f"{stem}, sm_{arch}: {kernel} is not in the budget")
                    continue
                for name, most in zip(BUDGETED, allowed, strict=False):
                    if facts[name] > most:
                        what = f"{name} {facts[name]}, budget {most}"
                        complaints.append(f"{stem}, sm_{arch}: {kernel}: {what}")
    return complaints


def table(found: dict[str, ByArch]) -> dict:
    """{file: {"sealed": {"80-86-89": digest}, "kernels": {kernel: {architecture: facts}}}}."""
    made: dict = {}
    for stem, by_arch in found.items():
        sealed = {"-".join(a): seal(stem, a, by_arch) for a in cuda_facts.groups()}
        kernels: dict[str, dict[str, list[int]]] = {}
        for arch, facts in by_arch.items():
            for kernel, row in facts.items():
                kernels.setdefault(kernel, {})[arch] = [row[name] for name in FACTS]
        made[stem] = {"sealed": sealed, "kernels": kernels}
    return made


def write(made: dict) -> None:
    """One line per kernel, so that a change shows as a line."""
    files = []
    for stem, part in sorted(made.items()):
        kernels = sorted(part["kernels"].items())
        rows = [f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels]
        text = f'  "sealed": {json.dumps(part["sealed"])},\n  "kernels": {{\n'
        files.append(f" {json.dumps(stem)}: {{\n{text}" + ",\n".join(rows) + "\n  }\n }")
    BUDGET.write_text("{\n" + ",\n".join(files) + "\n}\n")


def read() -> dict:
    """The committed budget."""
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else {}


def main() -> int:
    """Compares, or writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write tests/cuda_budget.json anew")
    parser.add_argument("--anew", action="store_true", help="compile what is recorded, too")
    parser.add_argument("--only", default="", help="files whose names hold this text")
    args = parser.parse_args()
    try:
        if args.write and cuda_facts.cuobjdump() is None:
            raise RuntimeError("no cuobjdump here: the CUDA toolkit and Triton's package have it")
        found = facts_of_all(args.only, anew=args.anew)
    except RuntimeError as error:
        print(f"cuda_budget: {error}", file=sys.stderr)
        return 1
    if args.write:
        write({**(read() if args.only else {}), **table(found)})
        print(f"written: {BUDGET}")
        return 0
    complaints = difference(found, read())
    print("\n".join(complaints) or "within the budget")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
