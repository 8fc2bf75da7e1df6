"""The CUDA library: links, loads without a GPU, registers its kernels.

What a machine without a GPU can say about it; no kernel runs here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

# tests/test_cuda_budget.py compiles for all architectures. No kernel runs here: intermediate code
# of one is enough, and only the compilers have to be quick. One file of all kernels and one of all
# bindings read the headers of CUDA and PyTorch once instead of ten times.
QUICK = """
import native, pathlib, sys
native.NVCC_FLAGS += " -Xcicc -O0 -Xcompiler -O0"
native.cuda_code = lambda arch: "-gencode arch=compute_90a,code=compute_90a"
flags = native.compile_flags
native.compile_flags = lambda *about: flags(*about).replace("-O3", "-O0")
out, kernels, bindings, tmp = map(pathlib.Path, sys.argv[1:])
native.cuda_kernels = lambda: [kernels]
native.cuda_bindings = lambda: [bindings]
native.build(out, ".so", tmp, only="_cuda.so")
"""

LOADS = """
import json, pathlib, re, sys
import torch, fastlm
from fastlm import _ext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

assert _ext.cuda_loaded, _ext.cuda_error
bindings = sorted(pathlib.Path(sys.argv[1], "csrc/torch/cuda").glob("*.cpp"))
names = [n for b in bindings for n in re.findall(r'm.impl\\("(\\w+)"', b.read_text())]
for name in names:
    operator = getattr(torch.ops.fastlm, name)  # the schema is declared in Python
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlm::" + name, "CUDA"), name
first = [fastlm.ops.implementations(binding.stem, "cuda")[0] for binding in bindings]

mode = FakeTensorMode()
meta = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
x = FakeTensor(mode, meta, torch.device("cuda:0"))
with mode, fastlm.ops._registry.recording() as verdicts:
    y, s = fastlm.ops.rms_norm(x, residual=x)
print(json.dumps({
    "operators": len(names), "first": first, "info": fastlm.info()["CUDA kernels"],
    "chosen": verdicts[0].chosen, "device": str(y.device), "shape": list(s.shape),
}))
"""


def in_one_file(files: list[Path], others: list[Path]) -> str:
    """Includes of files that were written to be compiled alone.

    What one declares under a name that another of them, or of the headers, uses is renamed.
    """
    names = {}
    for file in (*files, *others):
        text = file.read_text()
        constants = ";".join(re.findall(r"^constexpr \w+ ([^;]*;)", text, re.M))
        structs = re.findall(r"^struct (\w+)", text, re.M)
        names[file] = {*structs, *re.findall(r"(\w+) = ", constants)}
    count = Counter(name for own in names.values() for name in own)
    lines = []
    for file in files:
        shared = sorted(name for name in names[file] if count[name] > 1)
        lines += re.findall(r"^#include .*", file.read_text(), re.M)  # under their own names
        lines += [f"#define {name} {name}_{file.stem}" for name in shared]
        lines += [f'#include "{file}"', *(f"#undef {name}" for name in shared)]
    return "\n".join(lines) + "\n"


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
    headers = sorted((ROOT / "csrc/cuda").glob("*.cuh"))
    (folder / "kernels.cu").write_text(in_one_file(sorted(native.cuda_kernels()), headers))
    (folder / "bindings.cpp").write_text(in_one_file(native.cuda_bindings(), []))
    environment = {
        "FASTLM_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0a",
        "PYTHONPATH": str(ROOT / "build_support"),
    }
    places = [folder / name for name in ("fastlm", "kernels.cu", "bindings.cpp", "objects")]
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *map(str, places)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_loads_without_a_gpu_registers_every_operator_and_is_chosen(package):
    """One test, for one process that imports all of it."""
    environment = {**os.environ, "PYTHONPATH": str(package), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", LOADS, str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["operators"] >= 18
    assert set(said["first"]) == {"cuda"} and len(said["first"]) >= 9  # every row with a binding
    assert said["info"] == "loaded"
    assert (said["chosen"], said["device"], said["shape"]) == ("cuda", "cuda:0", [4, 64])


def test_a_function_of_pytorch_is_found_that_no_scope_holds(tmp_path):
    """Python loads PyTorch without RTLD_GLOBAL: a weak symbol finds none of its CUDA functions."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    (tmp_path / "torch.cpp").write_text('extern "C" int get_stream() { return 7; }')
    (tmp_path / "ours.cpp").write_text(
        '#include "torch/cuda/stream.h"\n'
        'extern "C" __attribute__((weak)) int get_stream();\n'
        'extern "C" bool by_weak_symbol() { return get_stream != nullptr; }\n'
        'extern "C" int by_name() {\n'
        '  void* f = fastlm::cuda::loaded_symbol("libmade_up.so", "get_stream");\n'
        "  return f == nullptr ? -1 : reinterpret_cast<int (*)()>(f)();\n"
        "}\n"
    )
    for name, source in (("libmade_up.so", "torch.cpp"), ("ours.so", "ours.cpp")):
        command = [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{ROOT / 'csrc'}",
            "-o",
            name,
            source,
        ]
        command += [f"-Wl,-soname,{name}"]
        subprocess.run(command, cwd=tmp_path, check=True)
    torch = "torch = ctypes.CDLL('./libmade_up.so'); "
    ours = "import ctypes; {}ours = ctypes.CDLL('./ours.so'); "
    ours += "print(ours.by_weak_symbol(), ours.by_name())"
    for loaded, said in (("", ["0", "-1"]), (torch, ["0", "7"])):
        command = [sys.executable, "-c", ours.format(loaded)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == said, done.stderr
