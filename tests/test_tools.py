"""tools/new_op.py: the row it writes is complete, clean, and passes its own tests."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "build_support")]
import native  # noqa: E402
import new_op  # noqa: E402


@pytest.fixture
def tree(tmp_path):
    for name in ("fastlm", "csrc", "tests/ops", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    for name in ("pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(tree), "FASTLM_QUIET": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("cpu", [False, True], ids=["reference", "cpu"])
def test_new_row_works(tree, cpu):
    files = new_op.create(tree, "double_it", cpu)
    assert len(files) == (7 if cpu else 4)
    for package in ("ops", "reference"):
        text = (tree / f"fastlm/{package}/__init__.py").read_text()
        assert f"from fastlm.{package}.double_it import double_it\n" in text
    if shutil.which("ruff", path=str(Path(sys.executable).parent)):
        ruff = [sys.executable, "-m", "ruff"]
        run(tree, *ruff, "check", "--no-cache", ".")
        run(tree, *ruff, "format", "--check", "--no-cache", ".")
    tests = ["-p", "no:cacheprovider", "tests/ops/test_double_it.py"]
    tests += ["-k", "not fullgraph"] if cpu else []  # it takes seconds
    assert " passed" in run(tree, sys.executable, "-m", "pytest", *tests).stdout
    clang_format = shutil.which("clang-format", path=str(Path(sys.executable).parent))
    if cpu and clang_format:
        run(tree, clang_format, "--dry-run", "-Werror", *(f for f in files if "csrc" in f))
    if cpu and shutil.which("g++"):
        check = f"g++ -std=c++20 -fsyntax-only -Wall -Wextra -Werror -Wno-psabi -I{tree / 'csrc'}"
        check += f" -isystem {native.find_torch() / 'include'} -DFASTLM_X86={int(native.is_x86())}"
        check += f" -DTORCH_TARGET_VERSION={native.ABI_TARGET} -DTORCH_STABLE_ONLY"
        kernel = f"{check} -DFASTLM_ISA=baseline -DFASTLM_STEM=double_it csrc/cpu/target.cpp"
        for command in (kernel, f"{check} csrc/torch/double_it.cpp"):
            run(tree, *shlex.split(command))


def test_nothing_is_overwritten(tree):
    with pytest.raises(SystemExit, match=r"fastlm/reference/rms_norm\.py exists"):
        new_op.create(tree, "rms_norm", False)


def test_a_bad_name_is_refused(tree):
    with pytest.raises(SystemExit, match="expected a name like soft_sign, got 'SoftSign'"):
        new_op.create(tree, "SoftSign", False)
