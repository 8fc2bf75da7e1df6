"""CUDA kernels checked on the CPU: compiled as C++ and run by an emulator of blocks and warps.

The operator's own tests run in a copy of the package whose CPU kernels are the emulated CUDA ones.
This shows that indexing, tails and sums are right, not that a GPU runs them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = Path(__file__).parent / "cuda_emulator"
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.S)
STANDIN = """
import torch
torch.ops.load_library({library!r})
def cpu_isa(): return "emulated CUDA"
def supported_isas(): return ["emulated CUDA"]
def build_info(): return dict(compiler="", torch="", torch_abi="", stems=[{stem!r}], cuda=False)
"""


def emulated(stem: str, folder: Path) -> Path:
    """A folder holding the package, with csrc/cuda/<stem>.cu in place of its CPU kernels."""
    kernel = (ROOT / f"csrc/cuda/{stem}.cu").read_text()
    launched = r"emulator::launch([&] { \1(\3); }, \2);"
    source = folder / f"{stem}.cpp"
    source.write_text(LAUNCH.sub(launched, kernel))
    assert "<<<" not in source.read_text()
    library = folder / "emulated.so"
    torch = native.find_torch()
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f"-DTORCH_TARGET_VERSION={native.ABI_TARGET}", "-DTORCH_STABLE_ONLY"]
    command += [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    command += ["-isystem", f"{torch / 'include'}", str(source)]
    command += [str(ROOT / f"csrc/torch/cuda/{stem}.cpp"), "-o", str(library)]
    command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = folder / "fastlm"
    package.mkdir()
    for entry in (ROOT / "fastlm").iterdir():
        if entry.suffix != ".so" and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "_C.py").write_text(STANDIN.format(library=str(library), stem=stem))
    return folder


def run(folder: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# Wide rows take the other layouts: a block of 128, 256 or 512 threads, and rows read twice. A
# shifted weight has no 16-byte alignment.
WIDE = """
import torch
from fastlm import ops, reference, _ext
from fastlm.testing import check
from tests_of_operator import baseline
assert _ext.native.cpu_isa() == "emulated CUDA"
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for shift, rows, cols in (
        (0, 9, 2048), (0, 3, 6000), (0, 2, 12288), (0, 2, 40000), (0, 300, 24), (1, 6, 2048),
        (1, 1, 2048), (1, 1, 6001), (1, 2, 12288)
    ):
        x, r = torch.randn(rows, cols, dtype=dtype), torch.randn(rows, cols, dtype=dtype)
        check(
            lambda x, w, r: ops.rms_norm(x, w[shift:], residual=r),
            lambda x, w, r: baseline(x, w[shift:], r),
            lambda x, w, r: reference.rms_norm(x, w[shift:], residual=r),
            [x, torch.randn(cols + shift, dtype=dtype), r],
        )
"""


def test_rms_norm(tmp_path):
    folder = emulated("rms_norm", tmp_path)
    tests = folder / "tests_of_operator.py"
    shutil.copy(ROOT / "tests/ops/test_rms_norm.py", tests)
    shutil.copy(ROOT / "tests/conftest.py", folder)  # the seed
    options = ["-q", "-p", "no:cacheprovider", "-k", "(matches and cpu) or empty or strided"]
    run(folder, "-m", "pytest", *options, str(tests))
    run(folder, "-c", WIDE)
