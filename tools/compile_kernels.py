"""Compiles every Triton kernel for every architecture, without a GPU, and writes what they need.

    python tools/compile_kernels.py            # compare with tests/triton/registers.json
    python tools/compile_kernels.py --write    # and write it anew
    python tools/compile_kernels.py --only norm --asm /tmp/asm

The launches are those that the calls in `examples()` of each module of fastlm/triton make. The
table holds, per launch and architecture, registers a thread, bytes spilled and bytes of shared
memory, as the assembler reports them. It belongs to one version of Triton; with another the check
compares no figures, only that everything compiles and spills no more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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


def compiled(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """The launch's kernel for a target."""
    options = {
        "num_warps": launch.config.warps,
        "num_stages": launch.config.stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source(launch), target=target, options=options)


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
    text = made.asm["amdgcn" if arch == "gfx942" else "ptx"]
    return [] if wanted in text else [f"{label} on {arch}: no {wanted}"]


def main() -> int:
    """Compiles, then compares or writes; returns the number of complaints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="one architecture")
    parser.add_argument("--asm", type=Path, help="folder for the assembler texts")
    args = parser.parse_args()
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    table: dict[str, dict[str, dict[str, int]]] = {}
    complaints: list[str] = []
    taken: set[tuple[str, str, Config]] = set()
    architectures = (args.arch,) if args.arch else ARCHITECTURES
    for name in modules(args.only):
        for arch in architectures:
            with watching() as some:
                found_here = launches(name, arch)
            taken |= some
            for label, launch in found_here.items():
                made = compiled(launch, TARGETS[arch])
                complaints += checks(label, arch, made)
                table.setdefault(label, {})[arch] = found = needs(made)
                print(f"{arch:8}{label:60}{found}", flush=True)
                if args.asm:
                    args.asm.mkdir(parents=True, exist_ok=True)
                    text = made.asm["amdgcn" if arch == "gfx942" else "ptx"]
                    plain = re.sub(r"\W+", "_", label)
                    (args.asm / f"{plain}.{arch}.s").write_text(text)
    if not args.only:
        complaints += untouched(taken, architectures)
    same = before.get("triton") == triton.__version__
    for label, row in table.items() if not args.write else ():
        for arch, found in row.items():
            allowed = before["kernels"].get(label, {}).get(arch)
            if allowed is None:
                complaints.append(f"{label} on {arch}: not in the table (--write)")
            elif found["spilled"] > allowed["spilled"]:
                complaints.append(f"{label} on {arch}: spills {found}, allowed {allowed}")
            elif same and found != allowed:
                complaints.append(f"{label} on {arch}: {found}, in the table {allowed} (--write)")
    if not (args.only or args.arch or args.write):
        gone = sorted(set(before["kernels"]) - set(table))
        complaints += [
            f"{label}: in the table, but no example makes it (--write)" for label in gone
        ]
    if args.write:
        kept = before["kernels"] if args.only or args.arch else {}
        for label, row in table.items():
            kept[label] = {**kept.get(label, {}), **row}
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kept.items())]
        body = ",\n".join(lines)
        text = f'{{"triton": "{triton.__version__}", "kernels": {{\n{body}\n}}}}\n'
        TABLE.write_text(text)
    for line in complaints:
        print(line, file=sys.stderr)
    return len(complaints)


RAW = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(min(main(), 1))
