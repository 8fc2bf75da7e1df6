"""The CUDA library: links, loads without a GPU, registers its kernels.

What a machine without a GPU can say about it; no kernel runs here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

# tests/test_cuda_budget.py compiles for all architectures. No kernel runs here: intermediate code
# of one is enough, and only the compilers have to be quick.
QUICK = """
import native, pathlib, sys
native.NVCC_FLAGS += " -Xcicc -O0 -Xcompiler -O0"
native.cuda_code = lambda arch: "-gencode arch=compute_90a,code=compute_90a"
flags = native.compile_flags
native.compile_flags = lambda *about: flags(*about).replace("-O3", "-O0")
out, tmp = map(pathlib.Path, sys.argv[1:])
native.build(out, ".so", tmp, only="_cuda.so")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package whose _cuda.so was built just now."""
    if native.find_cuda() is None:
        pytest.skip("no nvcc here")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "fastlm").mkdir()
    for entry in (ROOT / "fastlm").iterdir():
        if entry.name not in ("_cuda.so", "__pycache__"):
            (folder / "fastlm" / entry.name).symlink_to(entry)
    environment = {
        "FASTLM_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0a",
        "PYTHONPATH": str(ROOT / "build_support"),
    }
    done = subprocess.run(
        [sys.executable, "-c", QUICK, str(folder / "fastlm"), str(folder / "objects")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(folder: Path, code: str) -> str:
    """What a fresh process says that imports the copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_without_a_gpu_and_registers_every_operator(package):
    code = """
import re, pathlib, torch, fastlm
from fastlm import _ext
assert _ext.cuda_loaded, _ext.cuda_error
bindings = pathlib.Path({root!r}, "csrc/torch/cuda").glob("*.cpp")
names = [n for b in bindings for n in re.findall(r'm.impl\\("(\\w+)"', b.read_text())]
for name in names:
    operator = getattr(torch.ops.fastlm, name)  # the schema is declared in Python
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlm::" + name, "CUDA"), name
rows = [binding.stem for binding in pathlib.Path({root!r}, "csrc/torch/cuda").glob("*.cpp")]
first = dict((fastlm.ops.implementations(row, "cuda")[0], row) for row in rows)
print(len(names), *first, fastlm.info()["CUDA kernels"])
"""
    said = run(package, code.format(root=str(ROOT)))
    count, rest = said.split(" ", 1)
    assert int(count) >= 18
    assert rest.strip() == "cuda loaded"  # every row that has a binding lists it first


def test_public_function_picks_the_cuda_kernel(package):
    code = """
import torch, fastlm
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
mode = FakeTensorMode()
meta = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
x = FakeTensor(mode, meta, torch.device("cuda:0"))
with mode, fastlm.ops._registry.recording() as verdicts:
    y, s = fastlm.ops.rms_norm(x, residual=x)
print(verdicts[0].chosen, y.device, tuple(s.shape))
"""
    assert run(package, code).strip() == "cuda cuda:0 (4, 64)"
