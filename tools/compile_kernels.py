"""Compiles every Triton kernel for every architecture, without a GPU, and writes what they need.

    python tools/compile_kernels.py            # compare with tests/triton/registers.json
    python tools/compile_kernels.py --write    # and write what changed
    python tools/compile_kernels.py --anew     # compile what did not change, too
    python tools/compile_kernels.py --only norm --asm /tmp/asm

The launches are those that the calls in `examples()` of each module of fastlm/triton make. The
table holds, per launch and architecture, registers a thread, bytes spilled and bytes of shared
memory, as the assembler reports them, and a digest of all that they follow from (`digest`). What
has the digest of the table is not compiled again, for its figures are known; --anew, or
FASTLM_RECOMPILE=1, compiles it all the same. The table belongs to one version of Triton; with
another everything is compiled, and no figures are compared, only that nothing spills more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.language import constexpr
from triton.runtime import JITFunction

from fastlm.triton import _configs
from fastlm.triton._configs import ARCHITECTURES, Config
from fastlm.triton._launch import Launch, recording

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "triton" / "registers.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def modules(only: str) -> list[str]:
    """The modules of fastlm/triton with examples, by name."""
    files = sorted((ROOT / "fastlm" / "triton").glob("[a-z]*.py"))
    return [file.stem for file in files if only in file.stem]


def source(launch: Launch) -> ASTSource:
    """What Triton compiles for a launch: pointers aligned, numbers specialised as in a call."""
    function = launch.kernel.function
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    values = [*launch.tensors, *launch.scalars, *launch.constants.values()]
    for i, (parameter, value) in enumerate(zip(function.params, values, strict=True)):
        name, pointer = parameter.name, i < len(launch.tensors)
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif pointer:
            signature[name], attributes[i,] = TYPES[value], [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not free:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def options(launch: Launch) -> dict[str, object]:
    """What the compiler is told beside the source."""
    config = launch.config
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def compiled(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """The launch's kernel for a target."""
    return triton.compile(source(launch), target=target, options=options(launch))


@functools.lru_cache
def sources(function: JITFunction) -> list[str]:
    """A kernel and all functions it calls, and the constants they read: their source.

    Without the line each stands in, which Triton's own key has: a kernel that moved is the same.
    """
    found: dict[int, JITFunction] = {}
    constants: set[str] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        scope = inspect.getclosurevars(one.fn)
        for name, value in {**scope.globals, **scope.nonlocals}.items():
            if isinstance(value, JITFunction):
                waiting.append(value)
            elif isinstance(value, constexpr) or not hasattr(value, "__name__"):
                constants.add(f"{one.__module__}: {name} = {value}")
            elif not value.__name__.startswith("triton."):
                raise TypeError(f"{one.__name__} reads {name}, of which no digest is known")
    return sorted(f"{f.noinline} {f.src}" for f in found.values()) + sorted(constants)


def digest(launch: Launch, target: GPUTarget) -> str:
    """Of all that a compiled kernel's figures and instructions follow from."""
    made, backend = source(launch), make_backend(target)
    # the files of extern_libs lie in Triton, at a path of this machine
    told = backend.parse_options(options(launch)).__dict__
    parts: list[object] = [
        sources(launch.kernel.function),
        list(made.signature.items()),
        sorted((key, str(value)) for key, value in made.constants.items()),
        sorted(made.attrs.items()),
        sorted((key, str(value)) for key, value in told.items() if key != "extern_libs"),
        triton.__version__,
        backend.hash(),  # architecture and version of the assembler
        sorted(get_cache_invalidating_env_vars().items()),
        reading(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.lru_cache
def reading() -> list[object]:
    """How a compiled kernel is read here."""
    functions = compiled, needs, _resources, checks, assembler
    return [*map(inspect.getsource, functions), TENSOR_CORES, PRODUCT.pattern]


def needs(made: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Registers a thread, bytes spilled, bytes of shared memory."""
    if "amdgcn" in made.asm:
        text = made.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s*(\d+)", text)
            return int(found[1]) if found else 0

        spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
        used = field("vgpr_count")
    else:
        text = _resources(made.asm["cubin"])
        used = int(re.search(r"REG:(\d+)", text)[1])
        spilled = int(re.search(r"LOCAL:(\d+)", text)[1]) + int(re.search(r"STACK:(\d+)", text)[1])
    return {"registers": used, "spilled": spilled, "shared": made.metadata.shared}


def _resources(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def launches(name: str, architecture: str) -> dict[str, Launch]:
    """The launches of a module's examples, each kernel and form once."""
    module = importlib.import_module(f"fastlm.triton.{name}")
    found: dict[str, Launch] = {}
    seen: set[tuple[object, ...]] = set()
    for label, call in module.examples():
        with recording(architecture) as recorded:
            call()
        assert recorded, f"{name}: the example {label!r} launches nothing"
        for launch in recorded:
            made = source(launch)
            form = (launch.kernel, launch.config, made.hash())
            if form not in seen:
                seen.add(form)
                number = sum(k.startswith(f"{label}: {launch.kernel.name}") for k in found)
                suffix = f" ({number + 1})" if number else ""
                found[f"{label}: {launch.kernel.name}{suffix}"] = launch
    return found


@contextlib.contextmanager
def watching() -> Iterator[set[tuple[str, str, Config]]]:
    """Collects what the launchers take from the tables: kernel, architecture, configuration."""
    taken: set[tuple[str, str, Config]] = set()
    select = _configs._select

    def watched(name: str, size: int, arch: str) -> Config:
        config = select(name, size, arch)
        taken.add((name, arch, config))
        return config

    _configs._select = watched  # type: ignore[assignment]
    try:
        yield taken
    finally:
        _configs._select = select


def untouched(taken: set[tuple[str, str, Config]], architectures: Sequence[str]) -> list[str]:
    """The rows of the tables that no example takes, so that nothing of them was compiled."""
    complaints = []
    for name in _configs.TABLE:
        for arch in architectures:
            for bound, config in _configs.rows(name, arch):
                if (name, arch, config) not in taken:
                    complaints.append(f"{name} on {arch}: no example takes the row up to {bound}")
    return complaints


# the instruction of tensor cores, for products of fewer than 64 rows and for the others
TENSOR_CORES = {
    "sm_80": ("mma.sync", "mma.sync"),
    "sm_90": ("mma.sync", "wgmma.mma_async"),
    "sm_100": ("mma.sync", "tcgen05.mma"),
    "gfx942": ("v_mfma", "v_mfma"),
}
PRODUCT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)>")


def checks(label: str, arch: str, made: triton.compiler.CompiledKernel) -> list[str]:
    """What a kernel's instructions must show: tensor cores where it multiplies halves."""
    rows = [int(found) for found in PRODUCT.findall(made.asm["ttir"])]
    if not rows:
        return []
    wanted = TENSOR_CORES[arch][max(rows) >= 64]
    return [] if wanted in assembler(made) else [f"{label} on {arch}: no {wanted}"]


FIGURES = ("registers", "spilled", "shared")
Table = dict[str, dict[str, dict[str, Any]]]  # launch -> architecture -> what is known


def assembler(made: triton.compiler.CompiledKernel) -> str:
    """A kernel's text for the assembler."""
    return made.asm["amdgcn"] if "amdgcn" in made.asm else made.asm["ptx"]


def found_or_kept(
    label: str,
    arch: str,
    launch: Launch,
    known: dict[str, Any] | None,
    anew: bool,
    asm: Path | None,
) -> tuple[dict[str, Any], list[str]]:
    """(what a launch needs, complaints): what is known, or what its compilation shows.

    Where there are complaints there is no digest: it is compiled again until there are none.
    """
    digested = digest(launch, TARGETS[arch])
    if known is not None and known.get("digest") == digested and not anew:
        return known, []
    made = compiled(launch, TARGETS[arch])
    complaints = checks(label, arch, made)
    found = needs(made)
    print(f"{arch:8}{label:60}{found}", flush=True)
    if asm:
        asm.mkdir(parents=True, exist_ok=True)
        plain = re.sub(r"\W+", "_", label)
        (asm / f"{plain}.{arch}.s").write_text(assembler(made))
    return {**found, **({} if complaints else {"digest": digested})}, complaints


def compare(table: Table, allowed: Table, same: bool) -> list[str]:
    """What differs from the committed table; spills alone where it is another Triton's."""
    complaints = []
    for label, row in table.items():
        for arch, found in row.items():
            known = allowed.get(label, {}).get(arch)
            if known is None:
                complaints.append(f"{label} on {arch}: not in the table (--write)")
            elif found["spilled"] > known["spilled"]:
                complaints.append(f"{label} on {arch}: spills {found}, allowed {known}")
            elif same and any(found[name] != known[name] for name in FIGURES):
                complaints.append(f"{label} on {arch}: {found}, in the table {known} (--write)")
    return complaints


def write(table: Table, kept: Table) -> None:
    """Writes the table, beside the rows that were not asked for."""
    for label, row in table.items():
        kept[label] = {**kept.get(label, {}), **row}
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kept.items())]
    body = ",\n".join(lines)
    TABLE.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n{body}\n}}}}\n')


def main() -> int:
    """Compiles, then compares or writes; returns the number of complaints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--anew", action="store_true", help="compile what did not change, too")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="one architecture")
    parser.add_argument("--asm", type=Path, help="folder for the assembler texts")
    args = parser.parse_args()
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    anew = args.anew or args.asm is not None or os.environ.get("FASTLM_RECOMPILE") == "1"
    triton.knobs.compilation.always_compile |= anew  # whatever lies in Triton's own cache
    table: Table = {}
    complaints: list[str] = []
    taken: set[tuple[str, str, Config]] = set()
    architectures = (args.arch,) if args.arch else ARCHITECTURES
    for name in modules(args.only):
        for arch in architectures:
            with watching() as some:
                found_here = launches(name, arch)
            taken |= some
            for label, launch in found_here.items():
                known = before["kernels"].get(label, {}).get(arch)
                found, wrong = found_or_kept(label, arch, launch, known, anew, args.asm)
                table.setdefault(label, {})[arch] = found
                complaints += wrong
    if not args.only:
        complaints += untouched(taken, architectures)
    if args.write:
        write(table, before["kernels"] if args.only or args.arch else {})
    else:
        complaints += compare(table, before["kernels"], before.get("triton") == triton.__version__)
        if not (args.only or args.arch):
            gone = sorted(set(before["kernels"]) - set(table))
            complaints += [
                f"{label}: in the table, but no example makes it (--write)" for label in gone
            ]
    for line in complaints:
        print(line, file=sys.stderr)
    return len(complaints)


RAW = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(min(main(), 1))
