"""The build: what it finds, what it says where something is missing, what goes into a package."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads, without anything built."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastlm", "benchmarks", "csrc", "build_support", "scripts"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


# ---- native.py ---------------------------------------------------------------------------------


def test_finds_the_torch_of_this_environment():
    import torch

    assert native.find_torch() == Path(torch.__file__).parent
    assert native.torch_version(native.find_torch()) == (torch.__version__, torch.version.cuda)


def test_torch_can_be_pointed_at(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_TORCH_DIR", str(tmp_path))
    with pytest.raises(native.BuildError, match="FASTLM_TORCH_DIR: no torch package in"):
        native.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.99'\n")
    assert native.find_torch() == tmp_path
    assert native.torch_version(tmp_path) == ("2.99", None)


@pytest.mark.parametrize(
    "wanted, torch_cuda, toolkit, expected",
    [
        ("auto", None, "/cuda", False),
        ("auto", "13.0", "/cuda", True),
        ("auto", "13.0", None, False),
        ("1", None, "/cuda", True),
        ("0", "13.0", "/cuda", False),
    ],
)
def test_when_cuda_is_built(monkeypatch, wanted, torch_cuda, toolkit, expected):
    monkeypatch.setenv("FASTLM_CUDA", wanted)
    assert native.use_cuda(torch_cuda, toolkit and Path(toolkit)) is expected


@pytest.mark.parametrize(
    "wanted, text",
    [("yes", "expected 0, 1 or auto, got 'yes'"), ("1", "no CUDA toolkit was found")],
)
def test_impossible_cuda_is_refused(monkeypatch, wanted, text):
    monkeypatch.setenv("FASTLM_CUDA", wanted)
    with pytest.raises(native.BuildError, match=text):
        native.use_cuda(None, None)


def test_cuda_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX;12.0+PTX")
    assert native.cuda_arch_flags() == [
        "-gencode arch=compute_80,code=sm_86",
        "-gencode arch=compute_90a,code=sm_90a",
        "-gencode arch=compute_90a,code=compute_90a",
        "-gencode arch=compute_100,code=sm_120",
        "-gencode arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize("archs", ["Hopper", "9.0a;90", "8.0+SASS"])
def test_an_architecture_that_is_no_number_is_refused(monkeypatch, archs):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    with pytest.raises(native.BuildError, match="TORCH_CUDA_ARCH_LIST: expected numbers such as"):
        native.cuda_arch_flags()


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "ccache /nonexistent/g++", ""])
def test_missing_compiler_is_named(monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(native.NoCompiler, match=r"no C\+\+ compiler: .* not found; install g\+\+"):
        native.require_compiler()


def test_only_kernels_without_tiles_share_the_object_of_another_set():
    """A row that uses AMX and is not compiled for it would silently run without."""
    isas = list(native.ISA_FLAGS)
    for stem in native.kernel_stems():
        text = "".join(source.read_text() for source in native.kernel_sources(stem))
        tiles = re.search(r"\b_tile_\w+\(", text) is not None
        assert native.twin(stem, "amx", isas) == (None if tiles else "avx512bf16"), stem
        assert not any(native.twin(stem, isa, isas) for isa in isas if isa != "amx")
    assert [s for s in ("linear", "attention", "rope") if native.twin(s, "amx", isas)] == ["rope"]


CPUINFO = "processor\t: 0\nflags\t\t: fpu avx2 fma f16c {}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ("", 2),
        ("avx512f avx512bw avx512vl", 2),  # one of the four is missing
        ("avx512f avx512bw avx512vl avx512dq avx512_vnni", 3),
        ("avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16", 4),
        ("amx_tile amx_bf16", 2),  # a set stands on those before it
    ],
)
def test_a_native_build_has_the_sets_of_this_processor(monkeypatch, more, count):
    monkeypatch.setattr(native, "_cpuinfo", lambda: CPUINFO.format(more))
    isas = list(native.ISA_FLAGS)
    assert native.instruction_sets(x86=True) == isas
    monkeypatch.setenv("FASTLM_BUILD_ISAS", "native")
    assert native.instruction_sets(x86=True) == isas[:count]
    assert native.instruction_sets(x86=False) == ["baseline"]
    for isa in isas[count:]:  # a name for the linker
        assert native.twin("linear", isa, isas[:count]) == isas[count - 1]
    monkeypatch.setattr(native, "_cpuinfo", lambda: "")
    assert native.instruction_sets(x86=True) == isas
    monkeypatch.setenv("FASTLM_BUILD_ISAS", "avx2")
    with pytest.raises(native.BuildError, match="expected all or native, got 'avx2'"):
        native.instruction_sets(x86=True)


def test_missing_tool_is_named():
    with pytest.raises(native.BuildError, match="no_such_tool is not installed"):
        native.require_tool("no_such_tool")


# ---- setup.py ----------------------------------------------------------------------------------


def test_installs_and_runs_without_a_compiler(tree):
    built = setup(tree, "build", "--build-lib", "lib", CXX="/nonexistent/g++")
    assert built.returncode == 0, built.stderr
    assert "fastlm installs without native kernels: no C++ compiler" in built.stderr
    assert not list((tree / "lib").rglob("*.so"))
    # an editable install's finder would lend this copy the libraries of the original tree
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)];"
    code += "import torch, fastlm; fastlm.ops.rms_norm(torch.ones(2, 4));"
    code += "print(fastlm.explain('rms_norm', torch.ones(2, 4)).splitlines()[0])"
    run = python(tree / "lib", code)
    assert run.stdout.strip() == "rms_norm on cpu, float32, weight=None: reference", run.stderr
    assert run.stderr.count("RuntimeWarning: fastlm has no native kernels here") == 1
    assert python(tree / "lib", code, FASTLM_QUIET="1").stderr == ""


def test_missing_compiler_is_an_error_where_native_kernels_are_required(tree):
    built = setup(tree, "build", CXX="/nonexistent/g++", FASTLM_REQUIRE_NATIVE="1")
    assert built.returncode != 0
    assert "fastlm: no C++ compiler" in built.stderr


def test_missing_torch_is_an_error(tree, tmp_path):
    built = setup(tree, "build", FASTLM_TORCH_DIR=str(tmp_path / "nowhere"))
    assert built.returncode != 0
    assert "fastlm: FASTLM_TORCH_DIR: no torch package in" in built.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_source_that_does_not_compile_is_an_error(tree):
    for folder in ("cpu", "torch"):
        for file in (tree / "csrc" / folder).rglob("*.cpp"):
            file.unlink()
    (tree / "csrc/cpu/isa.cpp").write_text("int broken = ;\n")
    built = setup(tree, "build", FASTLM_CUDA="0")
    assert built.returncode != 0
    assert "csrc/cpu/isa.cpp:1:14: error" in built.stdout


def test_source_distribution_holds_the_sources(tree):
    made = setup(tree, "-q", "sdist", "-d", "dist")
    assert made.returncode == 0, made.stderr
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for file in ("csrc/cpu/target.cpp", "csrc/ops/rms_norm.h", "csrc/cuda/rms_norm.cu", "LICENSE"):
        assert file in names
    assert {"build_support/native.py", "fastlm/py.typed", "fastlm/cli/info.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_no_sources(tree):
    built = setup(tree, "build", "--build-lib", "lib", CXX="/nonexistent/g++")
    assert built.returncode == 0, built.stderr
    assert [entry.name for entry in (tree / "lib").iterdir()] == ["fastlm"]
    suffixes = {file.suffix for file in (tree / "lib").rglob("*") if file.is_file()}
    assert suffixes == {".py", ".typed", ".json", ".html"}  # tasks, and the benchmarks' page
    assert (tree / "lib/fastlm/benchmarks/ops/test_linear.py").is_file()
    assert not (tree / "lib/fastlm/benchmarks/results").exists()


# ---- scripts/bootstrap.py ----------------------------------------------------------------------


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts/bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bootstrap_refuses_an_old_python(bootstrap, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer is needed"):
        bootstrap.check_machine()


def test_bootstrap_says_how_to_get_a_compiler(bootstrap, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(SystemExit, match="apt-get install g\\+\\+"):
        bootstrap.check_machine()


def test_bootstrap_says_how_to_get_the_headers(bootstrap, monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit, match="apt-get install python3-dev"):
        bootstrap.check_machine()


def test_bootstrap_says_how_to_get_venv(bootstrap, monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(bootstrap, "runs", lambda python, code: False)
    with pytest.raises(SystemExit, match="apt-get install python3-venv"):
        bootstrap.make_venv()


def test_bootstrap_names_the_step_that_failed(bootstrap, capfd):
    with pytest.raises(SystemExit, match=r"(?s)counting failed; .*above\.\nTry again\."):
        bootstrap.run("counting", sys.executable, "-c", "raise SystemExit(3)", hint="Try again.")
    assert "counting" in capfd.readouterr().err


def test_bootstrap_knows_a_complete_interpreter(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "BASE", "torch pytest")
    assert bootstrap.has_everything(sys.executable, [])
    monkeypatch.setattr(bootstrap, "BASE", "torch no_such_module")
    assert not bootstrap.has_everything(sys.executable, [])


def test_bootstrap_installs_once(bootstrap, monkeypatch, tmp_path):
    steps = []
    monkeypatch.setattr(bootstrap, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(bootstrap, "make_venv", lambda: None)
    monkeypatch.setattr(bootstrap, "runs", lambda python, code: True)
    monkeypatch.setattr(bootstrap, "pip", lambda what, *a: steps.append(what))
    monkeypatch.setattr(bootstrap, "build", lambda python: steps.append("build"))
    bootstrap.install(["dev"])
    assert any("installing fastlm (dev)" in step for step in steps)
    for extras, expected in ((["dev"], ["build"]), ([], ["build"])):
        steps.clear()
        bootstrap.install(extras)
        assert steps == expected
    steps.clear()
    bootstrap.install(["bench"])  # one more extra: what was there stays
    assert "installing fastlm (bench, dev)" in steps
    monkeypatch.setattr(bootstrap, "wanted_key", lambda: "pyproject.toml changed")
    steps.clear()
    bootstrap.install([])
    assert any("installing" in step for step in steps)


def test_make_lists_its_targets():
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    listing = subprocess.run([make, "-C", str(ROOT)], capture_output=True, text=True).stdout
    for target in ("demo", "test", "lint", "bench", "build", "clean"):
        assert f"\n  {target} " in listing
