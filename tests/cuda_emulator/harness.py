"""Compiles CUDA kernels as C++ for the emulator, alone or in a copy of the package."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parent.parent
KEPT = ROOT / "build/cuda-emulator"
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.S)
SHARED = re.compile(
    r"(?:alignas\(\w+\)\s*)?__shared__\s+(?:alignas\(\w+\)\s*)?([\w:<>]+(?: \w+)*?)\s+(\w+)"
    r"((?:\[[^;]+?\])*);"
)
EXTERN = re.compile(r"extern " + SHARED.pattern.replace(r"[^;]+?", ""))
STANDIN = """
import torch
torch.ops.load_library({library!r})
def cpu_isa(): return "emulated CUDA"
def supported_isas(): return ["emulated CUDA"]
def build_info(): return dict(compiler="", torch="", torch_abi="", stems=[{stem!r}], cuda=False)
"""
FLAGS = ["-std=c++20", "-fPIC", "-Wno-unknown-pragmas", f"-I{EMULATOR}"]


def translate(text: str, name: str) -> str:
    """A .cu or .cuh as C++: launches and shared arrays become calls of the emulator."""
    text = LAUNCH.sub(r'emulator::launch("\1", [&] { \1(\3); }, \2);', text)
    text = EXTERN.sub(r"\1* \2 = static_cast<\1*>(emulator::dynamic_shared());", text)
    text = SHARED.sub(
        r"typedef \1 \2_shared\3; \2_shared& \2 ="
        r' emulator::shared<\2_shared>("\2", __LINE__);',
        text,
    )
    code = re.sub(r"//.*", "", text)
    assert "<<<" not in code, f"a launch in {name} is written in a new way"
    assert "__shared__" not in code, f"a shared array in {name} is declared in a new way"
    return text


def compile_kernels(source: Path, folder: Path, *objects: Path) -> Path:
    """The library of one .cu, its loads and stores watched, linked with `objects`."""
    translated = folder / "kernels"
    translated.mkdir()
    kernels = translated / f"{source.stem}.cpp"
    kernels.write_text(translate(source.read_text(), source.name))
    for header in (ROOT / "csrc/cuda").glob("*.cuh"):
        if not (EMULATOR / header.name).exists():  # else the emulator has its own
            (translated / header.name).write_text(translate(header.read_text(), header.name))
    watched = ["-O1", "-g1", "-fsanitize=thread,alignment"]
    watched += ["--param=tsan-instrument-func-entry-exit=0"]
    watched += [f"-I{translated}", f"-I{ROOT / 'csrc'}"]
    made = [_compile(kernels, folder, *watched)]
    made += _emulator()
    library = folder / "emulated.so"
    torch = native.find_torch()
    command = ["g++", "-shared", "-o", library, *made, *objects]
    _run([*command, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"] if objects else command)
    return library


def emulated(stem: str, folder: Path) -> Path:
    """A folder holding the package, with csrc/cuda/<stem>.cu in place of its CPU kernels."""
    torch = native.find_torch()
    flags = ["-O0", f"-I{ROOT / 'csrc'}", "-isystem", f"{torch / 'include'}"]
    flags += [f"-DTORCH_TARGET_VERSION={native.ABI_TARGET}", "-DTORCH_STABLE_ONLY"]
    for kind in ("const", "mutable"):
        flags.append(f"-Dtorch_get_{kind}_data_ptr=emulated_{kind}_data_ptr")
    binding = _compile(ROOT / f"csrc/torch/cuda/{stem}.cpp", folder, *flags, name="binding")
    library = compile_kernels(ROOT / f"csrc/cuda/{stem}.cu", folder, binding)
    package = folder / "fastlm"
    package.mkdir()
    for entry in (ROOT / "fastlm").iterdir():
        if entry.suffix != ".so" and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "_C.py").write_text(STANDIN.format(library=str(library), stem=stem))
    return folder


def own_tests(
    stem: str, folder: Path, which: str = "", script: str = "", *, half: bool = True
) -> None:
    """Runs some of the operator's own tests, and a script, on the emulated kernels.

    All in one process, which pays for its imports once. Not `half`: no fp16.
    """
    own, scripts = folder / "tests_of_operator.py", folder / "test_script.py"
    shutil.copy(ROOT / f"tests/ops/test_{stem}.py", own)  # a script may import it, too
    shutil.copy(ROOT / "tests/conftest.py", folder)  # the seed
    tests = []
    if which:
        which = f"({which}) and not [torch- and not -torch- and not -torch]"  # PyTorch's own
        which += "" if half else " and not (float16 and not bfloat16)"
        tests = ["-k", f"test_script or ({which})", str(own)]
    if script:
        (folder / "script.py").write_text(script)
        scripts.write_text("def test_script():\n    import script\n")
        tests.append(str(scripts))
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def _emulator() -> list[Path]:
    """The emulator's own objects, compiled once and kept under a digest of their sources."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for file in (*sorted(EMULATOR.glob("*.h")), *sorted(EMULATOR.glob("*.cpp")), Path(__file__)):
        digest.update(file.read_bytes())
    kept = KEPT / digest.hexdigest()[:16]
    names = ("emulator", "memory")
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=KEPT))  # others may compile the same at this moment
        for name in names:
            _compile(EMULATOR / f"{name}.cpp", fresh, "-O2")
        try:
            fresh.rename(kept)
        except OSError:
            shutil.rmtree(fresh)
    return [kept / f"{name}.o" for name in names]


def _compile(source: Path, folder: Path, *flags: str, name: str = "") -> Path:
    target = folder / f"{name or source.stem}.o"
    _run(["g++", *FLAGS, *flags, "-c", source, "-o", target])
    return target


def _run(command: list) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
