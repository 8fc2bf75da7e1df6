"""Compiles CUDA kernels as C++ for the emulator, and runs operators' tests on them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
def cpu_isa(): return "emulated CUDA"
def supported_isas(): return ["emulated CUDA"]
def build_info(): return dict(compiler="", torch="", torch_abi="", stems=[], cuda=False)
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


def compile_kernels(source: Path, folder: Path) -> Path:
    """The library of one .cu alone, its loads and stores watched."""
    headers = _translated(folder)
    library = folder / "emulated.so"
    _run(["g++", "-shared", "-o", library, _watched(source, headers), *_emulator()])
    return library


def operators() -> Path:
    """The library of all kernels of csrc/cuda, registered for CPU tensors.

    Kept in build/cuda-emulator under a digest of all it is made of.
    """
    torch = native.find_torch()
    kernels = [f for f in (ROOT / "csrc/cuda").glob("*.cu") if "// Computes" in f.read_text()]
    bindings = sorted((ROOT / "csrc/torch/cuda").glob("*.cpp"))
    digest = _digest([EMULATOR, ROOT / "csrc"], str(torch), native.torch_version(torch)[0])
    with _kept(f"operators-{digest}") as (kept, fresh):
        if fresh:
            # One file of all bindings reads PyTorch's headers once; their names are their own.
            together = kept / "bindings.cpp"
            together.write_text("".join(f'#include "{file}"\n' for file in bindings))
            flags = ["-O0", f"-I{ROOT / 'csrc'}", "-isystem", f"{torch / 'include'}"]
            flags += [f"-DTORCH_TARGET_VERSION={native.ABI_TARGET}", "-DTORCH_STABLE_ONLY"]
            for kind in ("const", "mutable"):
                flags.append(f"-Dtorch_get_{kind}_data_ptr=emulated_{kind}_data_ptr")
            headers = _translated(kept)
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                bound = pool.submit(_compile, together, kept, *flags)
                objects = list(pool.map(lambda file: _watched(file, headers), kernels))
            command = ["g++", "-shared", "-o", kept / "emulated.so", *objects, bound.result()]
            _run([*command, *_emulator(), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"])
    return kept / "emulated.so"


def package(folder: Path) -> Path:
    """A copy of the package, without its native library, that says it runs on the emulator."""
    made = folder / "fastlm"
    made.mkdir()
    for entry in (ROOT / "fastlm").iterdir():
        if entry.suffix != ".so" and entry.name != "__pycache__":
            (made / entry.name).symlink_to(entry)
    (made / "_C.py").write_text(STANDIN)
    return folder


class Tester:
    """A process that runs tests of operators on emulated kernels (tester.py)."""

    __test__ = False  # says to pytest that this is no test

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, EMULATOR / "tester.py", package(folder), operators()]
        # An operator's tests need no plugins, and each costs its import.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n"

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def own_tests(
        self, stem: str, folder: Path, which: str = "", script: str = "", *, half: bool = True
    ) -> None:
        """Runs some of the operator's own tests, and a script. Not `half`: no fp16."""
        own, scripts = folder / "tests_of_operator.py", folder / "test_script.py"
        shutil.copy(ROOT / f"tests/ops/test_{stem}.py", own)  # a script may import it, too
        shutil.copy(ROOT / "tests/conftest.py", folder)  # the seed
        tests = []
        if which:
            which = f"({which}) and not [torch- and not -torch- and not -torch]"  # PyTorch's own,
            which += " and not [reference and not -reference"  # and the formulas
            which += "" if half else " and not (float16 and not bfloat16)"
            tests = ["-k", f"test_script or ({which})", str(own)]
        if script:
            (folder / "script.py").write_text(script)
            scripts.write_text("def test_script():\n    import script\n")
            tests.append(str(scripts))
        said = folder / "said.txt"
        request = {"stem": stem, "folder": str(folder), "tests": tests, "said": str(said)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = self._process.stdout.readline().strip()
        assert status == "0", f"exit status {status}\n{said.read_text()[-8000:]}"


def _translated(folder: Path) -> Path:
    """A folder in `folder` with the headers of csrc/cuda as C++."""
    made = folder / "kernels"
    made.mkdir()
    for header in (ROOT / "csrc/cuda").glob("*.cuh"):
        if not (EMULATOR / header.name).exists():  # else the emulator has its own
            (made / header.name).write_text(translate(header.read_text(), header.name))
    return made


def _watched(source: Path, headers: Path) -> Path:
    """The object of one .cu, whose loads and stores call the emulator."""
    kernels = headers / f"{source.stem}.cpp"
    kernels.write_text(translate(source.read_text(), source.name))
    watched = ["-O1", "-g1", "-fsanitize=thread,alignment"]
    watched += ["--param=tsan-instrument-func-entry-exit=0"]
    watched += [f"-I{headers}", f"-I{ROOT / 'csrc'}"]
    return _compile(kernels, headers, *watched)


def _digest(folders: list[Path], *more: str) -> str:
    """Of the files of these folders and how they are compiled."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((FLAGS, version, more)).encode())
    files = [file for folder in folders for file in folder.rglob("*.*") if file.is_file()]
    for file in sorted(file for file in files if file.suffix != ".pyc"):
        digest.update(f"{file.relative_to(ROOT)} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _kept(name: str) -> Iterator[tuple[Path, bool]]:
    """A folder of build/cuda-emulator, and whether it has to be filled: by one process."""
    KEPT.mkdir(parents=True, exist_ok=True)
    stem = name.split("-")[0]
    with (KEPT / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept, whole = KEPT / name, KEPT / name / "whole"
        if whole.exists():
            yield kept, False
            return
        for old in KEPT.glob(f"{stem}-*"):
            shutil.rmtree(old)
        kept.mkdir()
        yield kept, True
        whole.touch()


def _emulator() -> list[Path]:
    """The emulator's own objects."""
    with _kept(f"emulator-{_digest([EMULATOR])}") as (kept, fresh):
        names = ("emulator", "memory")
        if fresh:
            for name in names:
                _compile(EMULATOR / f"{name}.cpp", kept, "-O2")
    return [kept / f"{name}.o" for name in names]


def _compile(source: Path, folder: Path, *flags: str) -> Path:
    target = folder / f"{source.stem}.o"
    _run(["g++", *FLAGS, *flags, "-c", source, "-o", target])
    return target


def _run(command: list) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
