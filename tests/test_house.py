"""The rules of the house (docs/design.md) as assertions on the tree."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm import _ext, ops, settings
from fastlm.ops import _registry

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "fastlm"
SOURCES = [
    file
    for folder in ("fastlm", "csrc", "benchmarks", "tests", "tools", "scripts", "build_support")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
]
PYTHON = [file for file in SOURCES if file.suffix == ".py" and PACKAGE in file.parents]


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


# ---- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", _registry.stems())
def test_row_is_complete(stem):
    for file in (
        f"fastlm/ops/{stem}.py",
        f"fastlm/reference/{stem}.py",
        f"tests/ops/test_{stem}.py",
        f"benchmarks/ops/test_{stem}.py",
    ):
        assert (ROOT / file).exists(), f"{stem}: {file} is missing"


COMPOSED = {"linear_cross_entropy"}  # on the CPU made of other rows' kernels


@pytest.mark.parametrize("stem", _registry.stems())
def test_native_backends_have_their_files(stem):
    names = {backend.name for backend in _registry.backends(stem)}
    cpu = [f"csrc/torch/{stem}.cpp"]
    if stem not in COMPOSED:
        cpu += [f"csrc/ops/{stem}.h", f"csrc/cpu/{stem}.h"]
    cuda = [f"csrc/cuda/{stem}.cu", f"csrc/torch/cuda/{stem}.cpp"]
    for backend, files in (("cpu", cpu), ("cuda", cuda), ("triton", [f"fastlm/triton/{stem}.py"])):
        if backend in names:
            missing = [file for file in files if not (ROOT / file).exists()]
            assert not missing, f"{stem} lists {backend!r} but lacks {missing}"


def test_every_public_operator_is_documented():
    for name in ops.__all__:
        thing = getattr(ops, name)
        text = inspect.getdoc(thing) or ""
        assert len(text) > 40, f"ops.{name} has no docstring"
        if name in _registry.stems():
            for section in ("Args:", "Returns:", "Raises:"):
                assert section in text, f"ops.{name}: no {section!r} in its docstring"


# ---- text --------------------------------------------------------------------------------------


def test_files_are_one_idea_long():
    long = {short(f): n for f in SOURCES if (n := len(f.read_text().splitlines())) > 500}
    assert not long, f"over 500 lines: {long}"


def test_every_python_file_says_what_it_is():
    """In a docstring of the module, or of everything public in it."""
    for file in PYTHON:
        module = ast.parse(file.read_text())
        public = [
            node
            for node in module.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        if not ast.get_docstring(module):
            silent = [node.name for node in public if not ast.get_docstring(node)]
            assert not silent, f"{short(file)}: no docstring for {silent}"


FIELDS = ("Computes", "Algorithm", "Tile", "Traffic", "Numerics", "Source")


def test_every_kernel_file_has_its_header():
    kernels = [f for f in (CSRC / "cpu").glob("*.h") if "\nFASTLM_EXPORT(" in f.read_text()]
    kernels += [f for f in (CSRC / "cuda").glob("*.cu") if "__global__" in f.read_text()]
    assert kernels
    for file in kernels:
        header = file.read_text().split("\n#", 1)[0]
        for field in FIELDS:
            assert f"// {field:<10} " in header, f"{short(file)}: no {field!r} in its header"


def test_every_triton_kernel_has_its_header():
    kernels = [f for f in (PACKAGE / "triton").glob("*.py") if "\n@kernel(" in f.read_text()]
    assert kernels
    for file in kernels:
        header = ast.get_docstring(ast.parse(file.read_text())) or ""
        for field in FIELDS:
            assert f"\n{field:<10} " in header, f"{short(file)}: no {field!r} in its docstring"


def test_nothing_is_left_for_later():
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError|mark\.(xfail|flaky)")
    for file in SOURCES:
        if file == Path(__file__):
            continue
        found = mark.search(file.read_text())
        assert not found, f"{short(file)}: {found[0]}"


def test_no_pickled_loading():
    """Weights come from safetensors and GGUF; a pickle runs code."""
    for file in PYTHON:
        text = file.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib)\b", text, re.M), short(file)
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{short(file)}: {call}"


def test_every_environment_variable_is_documented():
    reads = re.compile(
        r"""(?:environ(?:\.get|\.pop|\.setdefault)?\s*[\[(]|getenv\()\s*["']([A-Z][A-Z0-9_]+)"""
    )
    folders = (PACKAGE, CSRC, ROOT / "build_support")
    for file in [f for f in SOURCES if any(folder in f.parents for folder in folders)]:
        for name in reads.findall(file.read_text()):
            assert name in settings.__doc__, f"{short(file)} reads {name}: not in settings.py"


# ---- dependencies ------------------------------------------------------------------------------

# Part of the package -> the parts it may import. What is not named may import everything.
BASE = {"_version", "_ext", "settings"}
MAY_IMPORT = {
    "_version": set(),
    "settings": set(),
    "_ext": {"settings", "_version"},
    "reference": {"reference"},
    "testing": set(),
    "triton": BASE | {"triton", "ops"},
    "ops": BASE | {"ops", "reference", "triton"},
    "nn": BASE | {"nn", "ops", "reference"},
    "models": BASE | {"models", "nn", "ops", "reference", "hf"},
    "data": BASE | {"data", "hf"},
}


def imported_parts(file: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            parts |= {n.name.split(".")[1] for n in node.names if n.name.startswith("fastlm.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastlm":
            parts |= {n.name for n in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlm."):
            parts.add(node.module.split(".")[1])
    return parts


def test_nothing_imports_what_stands_above_it():
    for file in PYTHON:
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        above = imported_parts(file) - MAY_IMPORT.get(part, imported_parts(file))
        assert not above, f"{short(file)} imports {sorted(above)}"


def test_kernels_are_free_of_torch():
    for folder in ("ops", "cpu", "cuda", "common"):
        for file in (CSRC / folder).rglob("*.*"):
            found = re.search(r'#include\s*["<](torch|ATen|c10|pybind11)\S*', file.read_text())
            assert not found, f"{short(file)}: {found[0]}"


def test_cpu_kernels_include_no_cpp_header():
    """Their objects are compiled for several sets: a shared inline function could be mixed up."""
    for file in [*(CSRC / "cpu").glob("*.h")]:
        if file.name == "isa.h":
            continue
        text = file.read_text()
        assert not re.search(r"#include\s*<", text), f"{short(file)} includes a system header"
        assert "std::" not in text, f"{short(file)} uses std::"


def test_import_stays_light():
    heavy = ["transformers", "triton", "matplotlib", "tokenizers", "click", "gguf", "rich"]
    code = "import sys, torch; before = set(sys.modules); import fastlm;"
    code += f"print(sorted(set({heavy}) & (set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_lazy_names_resolve():
    for name in fastlm.__all__:
        assert getattr(fastlm, name) is not None
    assert set(fastlm.__all__) <= set(dir(fastlm))


# ---- objects -----------------------------------------------------------------------------------


def isa_objects(tmp_path: Path) -> list[Path]:
    """The objects of the last build, or one compiled now."""
    built = ROOT.glob(f"build/native-*-{sys.implementation.cache_tag}/*.*.o")
    found = [o for o in built if (CSRC / "cpu" / f"{o.name.split('.')[0]}.h").exists()]
    if found:
        return found
    if shutil.which("g++") is None:
        pytest.skip("neither objects of a build nor a compiler")
    sys.path.insert(0, str(ROOT / "build_support"))
    import native

    target = tmp_path / "rms_norm.avx2.o"
    command = f"g++ -std=c++20 -O3 -fPIC {native.ISA_FLAGS['avx2']} -I{CSRC} -DFASTLM_X86=1"
    command += f" -DFASTLM_ISA=avx2 -DFASTLM_STEM=rms_norm -c {CSRC}/cpu/target.cpp -o {target}"
    subprocess.run(shlex.split(command), check=True)
    return [target]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_objects_of_a_set_export_their_table_alone(tmp_path):
    """A weak or shared function compiled for AVX-512 could be linked into the baseline's path."""
    for file in isa_objects(tmp_path):
        listing = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True)
        symbols = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
        symbols = [s for s in symbols if len(s) == 3]
        weak = [name for _, kind, name in symbols if kind in "WwVvu"]
        assert not weak, f"{file.name}: weak symbols {weak}"
        stem, isa = file.name.split(".")[:2]
        exported = [name for _, kind, name in symbols if kind.isupper() and kind != "U"]
        assert exported == [f"fastlm::{isa}::{stem}"], f"{file.name} exports {exported}"


@pytest.mark.skipif(_ext.native is None, reason="no native kernels")
def test_library_keeps_to_the_stable_abi():
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if audit is None:
        pytest.skip("torch-abi-audit is not installed (extra dev)")
    command = [audit, "--check", "torch", str(Path(_ext.native.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- examples ----------------------------------------------------------------------------------


@pytest.mark.skipif(_ext.native is None, reason="explain's example shows native kernels")
@pytest.mark.parametrize("name", ["explain", "info", *(f"ops.{s}" for s in _registry.stems())])
def test_docstring_examples(name):
    names = {"torch": torch, "fastlm": fastlm, "ops": ops, "explain": fastlm.explain}
    module = importlib.import_module(f"fastlm.{name}")
    assert doctest.testmod(module, extraglobs=names).failed == 0
