"""Compiles every CUDA kernel for every architecture, without a GPU, and says what each needs.

    python tools/cuda_budget.py            # compare with tests/cuda_budget.json
    python tools/cuda_budget.py --write    # and write it anew
    python tools/cuda_budget.py --only rope

The budget holds, per kernel and architecture, registers a thread, bytes spilled and bytes of static
shared memory, as the assembler reports them. What was compiled once is kept in build/cuda-budget
under a digest of sources, flags and compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

BUDGET = ROOT / "tests" / "cuda_budget.json"
CACHE = ROOT / "build" / "cuda-budget"
ARCHS = ("80", "86", "89", "90a", "100a", "120")
FACTS = ("registers", "spilled", "shared")

Kernels = dict[str, dict]  # kernel -> registers, spilled, shared, and counts of instructions


def stems(only: str = "") -> list[str]:
    """The files of csrc/cuda that hold kernels."""
    found = sorted(
        f.stem for f in (ROOT / "csrc/cuda").glob("*.cu") if "// Computes" in f.read_text()
    )
    return [stem for stem in found if only in stem]


def cuobjdump() -> Path | None:
    """The disassembler of the CUDA toolkit, or the one in Triton's package."""
    cuda = native.find_cuda()
    places = [cuda / "bin"] if cuda else []
    places += [Path(p or ".") / "triton/backends/nvidia/bin" for p in sys.path]
    return next((p / "cuobjdump" for p in places if (p / "cuobjdump").exists()), None)


def compile_all(only: str = "") -> dict[str, dict[str, Kernels]]:
    """{stem: {architecture: {kernel: facts}}}."""
    groups: dict[str, list[str]] = {}  # by the intermediate code they share
    for arch in ARCHS:
        groups.setdefault(native.PTX_OF.get(arch, arch), []).append(arch)
    tasks = [(stem, tuple(archs)) for stem in stems(only) for archs in groups.values()]
    longest = sorted(tasks, key=lambda task: -len(read().get(task[0], {})) * len(task[1]))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        made = dict(zip(longest, pool.map(lambda task: compile_one(*task), longest), strict=True))
    found: dict[str, dict[str, Kernels]] = {}
    for stem, archs in tasks:
        found.setdefault(stem, {}).update(made[stem, archs])
    return found


def compile_one(stem: str, archs: tuple[str, ...]) -> dict[str, Kernels]:
    """A file's kernels for architectures of one intermediate code; RuntimeError if it does not."""
    cuda = native.find_cuda()
    if cuda is None:
        raise RuntimeError("no nvcc here")
    source = ROOT / f"csrc/cuda/{stem}.cu"
    flags = native.NVCC_FLAGS.split()
    flags += [word for arch in archs for word in native.cuda_code(arch).split()]
    digest = hashlib.sha256(f"{flags} {cuobjdump()}".encode())
    for file in (*_sources(source), cuda / "version.json", Path(__file__)):
        digest.update(file.read_bytes() if file.exists() else b"")
    name = f"{stem}.{'-'.join(archs)}"
    kept = CACHE / f"{name}.{digest.hexdigest()[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.fatbin"
        command = [str(cuda / "bin/nvcc"), *flags, "--resource-usage"]
        command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}", "-fatbin", "-o", str(binary)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{stem} for sm_{archs}:\n{done.stdout}{done.stderr}")
        found = _resources(done.stdout + done.stderr)
        dump = cuobjdump()
        if dump is not None:
            sass = subprocess.run([dump, "-sass", binary], capture_output=True, text=True)
            _instructions(sass.stdout, found)
    made = {arch: _named(found[arch]) for arch in archs}
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{name}.*"):
        old.unlink(missing_ok=True)
    fresh = kept.with_suffix(f".{os.getpid()}")  # others may compile the same at this moment
    fresh.write_text(json.dumps(made))
    fresh.replace(kept)
    return made


def _sources(file: Path) -> list[Path]:
    """The file and what it includes of ours, directly or not."""
    found = [file]
    for source in found:  # grows
        for name in re.findall(r'^#include "([^"]+)"', source.read_text(), re.M):
            places = (ROOT / "csrc" / name, ROOT / "csrc/cuda" / name)
            found += [p for p in places if p.exists() and p not in found]
    return found


def _resources(said: str) -> dict[str, Kernels]:
    """What ptxas reports of each entry function, by architecture and mangled name."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        re.S,
    )
    found: dict[str, Kernels] = {}
    for name, arch, stores, loads, registers, shared in entry.findall(said):
        found.setdefault(arch, {})[name] = {
            "registers": int(registers),
            "spilled": int(stores) + int(loads),
            "shared": int(shared or 0),
        }
    return found


COUNTED = {  # which instructions of a kernel's disassembly are counted
    "wide_loads": r"LDG?\.\S*(128|256)",
    "wide_stores": r"STG?\.\S*(128|256)",
    "local": r"(LDL|STL)\b",
    "tensor_core": r"(HMMA|HGMMA|IMMA|UTC\w*MMA)\b",
}
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\S+)", re.M)


def _instructions(sass: str, found: dict[str, Kernels]) -> None:
    arch = ""
    for part in re.split(r"\n(?=\s*Function : |arch = sm_)", sass):
        head, _, body = part.strip().partition("\n")
        if head.startswith("arch = sm_"):
            arch = head.removeprefix("arch = sm_").strip()
        if not head.startswith("Function : "):
            continue
        opcodes = Counter(OPCODE.findall(body))
        facts = found[arch][head.removeprefix("Function : ").strip()]
        for what, pattern in COUNTED.items():
            facts[what] = sum(n for code, n in opcodes.items() if re.match(pattern, code))


def _named(kernels: Kernels) -> Kernels:
    return dict(sorted(zip(_readable(list(kernels)), kernels.values(), strict=True)))


def _readable(names: Sequence[str]) -> list[str]:
    """backward_kernel<true, float, Layout<4, 8, 2>>: without the compiler's name of the file."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    shown = []
    for line in done.stdout.splitlines():
        text = re.sub(r"\([^()]*\)$", "", line.removeprefix("void "))
        text = re.sub(r"fastlm::(\w+::)*|_GLOBAL__N__\w+::|\(anonymous namespace\)::", "", text)
        text = re.sub(r"\([^()]*\)$", "", text)
        shown.append(re.sub(r"\((bool|int)\)", "", text).replace("> >", ">>"))
    return shown


def difference(found: dict[str, dict[str, Kernels]], budget: dict) -> list[str]:
    """What needs more than it may; fewer registers are no complaint."""
    complaints = []
    for stem, by_arch in found.items():
        for arch, kernels in by_arch.items():
            for kernel, facts in kernels.items():
                allowed = budget.get(stem, {}).get(kernel, {}).get(arch)
                if allowed is None:
                    complaints.append(f"{stem}, sm_{arch}: {kernel} is not in the budget")
                    continue
                for name, most in zip(FACTS, allowed, strict=True):
                    if facts[name] > most:
                        what = f"{name} {facts[name]}, budget {most}"
                        complaints.append(f"{stem}, sm_{arch}: {kernel}: {what}")
    return complaints


def table(found: dict[str, dict[str, Kernels]]) -> dict:
    """{stem: {kernel: {architecture: [registers, spilled, shared]}}}."""
    made: dict = {}
    for stem, by_arch in found.items():
        for arch, kernels in by_arch.items():
            for kernel, facts in kernels.items():
                row = made.setdefault(stem, {}).setdefault(kernel, {})
                row[arch] = [facts[name] for name in FACTS]
    return made


def write(made: dict) -> None:
    """One line per kernel, so that a change shows as a line."""
    lines = []
    for stem, kernels in sorted(made.items()):
        rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels.items())]
        lines.append(f" {json.dumps(stem)}: {{\n" + ",\n".join(rows) + "\n }")
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read() -> dict:
    """The committed budget."""
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else {}


def main() -> int:
    """Compares, or writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write tests/cuda_budget.json anew")
    parser.add_argument("--only", default="", help="files whose names hold this text")
    args = parser.parse_args()
    try:
        found = compile_all(args.only)
    except RuntimeError as error:
        print(f"cuda_budget: {error}", file=sys.stderr)
        return 1
    if args.write:
        kept = read() if args.only else {}
        write({**kept, **table(found)})
        print(f"written: {BUDGET}")
        return 0
    complaints = difference(found, read())
    print("\n".join(complaints) or "within the budget")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
