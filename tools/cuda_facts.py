"""What the compiler makes of a CUDA kernel, measured without a GPU, and what that depends on.

Facts of a kernel: registers a thread, bytes spilled, bytes of static shared memory, and how many
instructions of some kinds its machine code has. `inputs` is a digest of everything that decides
them. tools/cuda_budget.py keeps facts and digests in tests/cuda_budget.json.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

CACHE = ROOT / "build" / "cuda-budget"
CSRC = ROOT / "csrc"
ARCHS = ("80", "86", "89", "90a", "100a", "120")
BUDGETED = ("registers", "spilled", "shared")
COUNTED = {  # which instructions of a kernel's disassembly are counted
    "wide_loads": r"LDG?\.\S*(128|256)",
    "wide_stores": r"STG?\.\S*(128|256)",
    "local": r"(LDL|STL)\b",
    "tensor_core": r"(HMMA|HGMMA|IMMA|UTC\w*MMA)\b",
}
FACTS = (*BUDGETED, *COUNTED)

Kernels = dict[str, dict[str, int]]  # kernel -> its facts
ByArch = dict[str, Kernels]


def stems(only: str = "") -> list[str]:
    """The files of csrc/cuda that hold kernels."""
    found = sorted(f.stem for f in (CSRC / "cuda").glob("*.cu") if "// Computes" in f.read_text())
    return [stem for stem in found if only in stem]


def groups() -> list[tuple[str, ...]]:
    """The architectures, those of one intermediate code together: it is made once."""
    found: dict[str, list[str]] = {}
    for arch in ARCHS:
        found.setdefault(native.PTX_OF.get(arch, arch), []).append(arch)
    return [tuple(archs) for archs in found.values()]


def cuobjdump() -> Path | None:
    """The disassembler of the CUDA toolkit, or the one in Triton's package."""
    cuda = native.find_cuda()
    places = [cuda / "bin"] if cuda else []
    places += [Path(p or ".") / "triton/backends/nvidia/bin" for p in sys.path]
    return next((p / "cuobjdump" for p in places if (p / "cuobjdump").exists()), None)


def flags(archs: Sequence[str]) -> list[str]:
    """The compiler's, apart from folders; the build's own are the same."""
    codes = [word for arch in archs for word in native.cuda_code(arch).split()]
    return [*native.NVCC_FLAGS.split(), "--resource-usage", "-fatbin", *codes]


@functools.cache
def compilers() -> str:
    """Versions of nvcc, which stands for its headers and assembler too, and of the C++ compiler."""
    cuda = native.find_cuda()
    if cuda is None:
        raise RuntimeError("no nvcc here")
    told = subprocess.run([cuda / "bin/nvcc", "--version"], capture_output=True, text=True)
    host = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True)
    return f"{told.stdout.strip().splitlines()[-1]}, g++ {host.stdout.strip()}"


def sources(file: Path) -> list[Path]:
    """The file and what it includes of ours, directly or not."""
    found = [file]
    for source in found:  # grows
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.M):
            for place in (source.parent / name, CSRC / name, CSRC / "cuda" / name):
                if place.exists() and place.resolve() not in found:
                    found.append(place.resolve())
    return found


def inputs(stem: str, archs: Sequence[str]) -> str:
    """A digest of all that the facts depend on: sources, flags, compilers and this file.

    The disassembler is left out: it reads what the compiler made, and is not the same everywhere.
    """
    digest = hashlib.sha256(f"{flags(archs)} {compilers()}".encode())
    for file in (*sources(CSRC / f"cuda/{stem}.cu"), Path(__file__)):
        text = file.read_bytes()
        digest.update(f"{file.name} {len(text)} ".encode() + text)
    return digest.hexdigest()


def measured(stem: str, archs: tuple[str, ...], *, anew: bool = False) -> ByArch:
    """A file's kernels for architectures of one intermediate code; RuntimeError if it does not.

    Kept in build/cuda-budget, for whoever asks while tests/cuda_budget.json is behind; `anew`
    compiles all the same.
    """
    name = f"{stem}.{'-'.join(archs)}"
    with _alone(name):
        dump = cuobjdump()
        digest = hashlib.sha256(f"{inputs(stem, archs)} {dump}".encode()).hexdigest()
        kept = CACHE / f"{name}.{digest[:16]}.json"
        if kept.exists() and not anew:
            return json.loads(kept.read_text())
        made = compiled(stem, archs)
        for old in CACHE.glob(f"{name}.*.json"):
            old.unlink(missing_ok=True)
        kept.write_text(json.dumps(made))
    return made


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Of several processes one compiles, and the others find what it made."""
    import fcntl

    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiled(stem: str, archs: Sequence[str]) -> ByArch:
    """Compiles a file, whatever is known of it; RuntimeError if it does not compile."""
    cuda = native.find_cuda()
    if cuda is None:
        raise RuntimeError("no nvcc here")
    source = CSRC / f"cuda/{stem}.cu"
    with tempfile.TemporaryDirectory() as folder:
        binary, listed = Path(folder) / "kernels.fatbin", Path(folder) / "kernels.d"
        command = [str(cuda / "bin/nvcc"), *flags(archs), "-MD", "-MF", str(listed)]
        command += [f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "-o", str(binary), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{stem} for sm_{archs}:\n{done.stdout}{done.stderr}")
        _check_sources(source, listed.read_text())
        found = _resources(done.stdout + done.stderr)
        dump = cuobjdump()
        if dump is not None:
            sass = subprocess.run([dump, "-sass", binary], capture_output=True, text=True)
            _instructions(sass.stdout, found)
    return {arch: _named(found[arch]) for arch in archs}


def _check_sources(source: Path, listed: str) -> None:
    """The digest's list of files is the compiler's own."""
    words = listed.replace("\\\n", " ").split()
    read = {path for path in (Path(word).resolve() for word in words) if CSRC in path.parents}
    if read != set(sources(source)):
        names = sorted(str(p.relative_to(ROOT)) for p in read ^ set(sources(source)))
        raise RuntimeError(f"{source.name}: the digest and the compiler differ in {names}")


def _resources(said: str) -> ByArch:
    """What ptxas reports of each entry function, by architecture and mangled name."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        re.S,
    )
    found: ByArch = {}
    for name, arch, stores, loads, registers, shared in entry.findall(said):
        found.setdefault(arch, {})[name] = {
            "registers": int(registers),
            "spilled": int(stores) + int(loads),
            "shared": int(shared or 0),
        }
    return found


OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\S+)", re.M)


def _instructions(sass: str, found: ByArch) -> None:
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


def asked_anew() -> bool:
    """Whether FASTLM_RECOMPILE=1 asks for everything to be compiled, known or not."""
    return os.environ.get("FASTLM_RECOMPILE") == "1"
