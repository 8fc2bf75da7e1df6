"""What tells a Triton kernel that need not be compiled again from one that must."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (extra test)")

from fastlm.triton._configs import Config
from fastlm.triton._launch import recording

ROOT = Path(__file__).resolve().parent.parent
KERNELS = """
import triton
import triton.language as tl

from fastlm.triton._launch import kernel

FACTOR = tl.constexpr(2.0)


@triton.jit
def twice(x):
    return inner(x) * FACTOR


@triton.jit
def inner(x):
    return x + 1.0


@kernel()
def add(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, twice(tl.load(x + i, mask=i < n)), mask=i < n)
"""


def module_at(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return module_at("compile_kernels", ROOT / "tools" / "compile_kernels.py")


@pytest.fixture
def launch(tmp_path):
    """A function: source text -> the launch of its kernel."""

    def make(text, dtype=torch.float32, n=64, warps=2, stages=1, block=64):
        file = tmp_path / f"kernels{len(list(tmp_path.iterdir()))}.py"
        file.write_text(text)
        module = module_at("kernels", file)
        x = torch.empty(n, dtype=dtype, device="meta")
        with recording("sm_90") as launches:
            module.add((1, 1, 1), (x, x), (n,), Config((64,), warps, stages), BLOCK=block)
        return launches[0]

    return make


def test_a_digest_covers_all_that_a_compiled_kernel_follows_from(tool, launch, monkeypatch):
    target = tool.TARGETS["sm_90"]

    def digest(text=KERNELS, target=target, **how):
        return tool.digest(launch(text, **how), target)

    first = digest()
    assert digest() == first, "of the same source in another file"
    assert digest("\n\n# moved\n" + KERNELS) == first
    free = KERNELS.replace("@kernel()", '@kernel(do_not_specialize=["n"])')
    assert digest(free) == digest(free, n=1) == digest(n=65), "compiled alike"
    others = [
        digest(KERNELS.replace("* BLOCK + tl", "* BLOCK + 0 + tl")),  # the kernel
        digest(KERNELS.replace("return inner(x) *", "return inner(x) / ")),  # what it calls
        digest(KERNELS.replace("x + 1.0", "x + 2.0")),  # what that calls
        digest(KERNELS.replace("constexpr(2.0)", "constexpr(3.0)")),
        digest(KERNELS.replace("@triton.jit\ndef inner", "@triton.jit(noinline=True)\ndef inner")),
        digest(dtype=torch.float16),
        digest(n=65),  # no multiple of 16
        digest(n=1),  # a constant
        digest(block=32),
        digest(warps=4),
        digest(stages=3),
        digest(target=tool.TARGETS["sm_80"]),
        digest(target=tool.TARGETS["gfx942"]),
    ]
    with monkeypatch.context() as patch:
        patch.setattr("triton.__version__", "3.0.0")
        others.append(digest())
    with monkeypatch.context() as patch:
        patch.setattr("triton.backends.nvidia.compiler.get_ptxas_version", lambda arch: "0")
        others.append(digest())
    with monkeypatch.context() as patch:
        patch.setattr(tool, "get_cache_invalidating_env_vars", lambda: {"DISABLE_LLVM_OPT": "1"})
        others.append(digest())
    with monkeypatch.context() as patch:
        patch.setattr(tool, "reading", lambda: ["otherwise"])
        others.append(digest())
    assert len({first, *others}) == 1 + len(others)


def test_a_kernel_that_reads_what_has_no_digest_is_refused(tool, launch):
    text = KERNELS.replace("import triton\n", "import triton\nimport math\n", 1)
    with pytest.raises(TypeError, match="inner reads math, of which no digest is known"):
        tool.digest(launch(text.replace("x + 1.0", "x + math.pi")), tool.TARGETS["sm_90"])


def test_what_has_the_digest_of_the_table_is_not_compiled(tool, launch, monkeypatch, capsys):
    compiled, complaints = [], []

    def compile_one(launch, target):
        compiled.append(launch)

    monkeypatch.setattr(tool, "compiled", compile_one)
    monkeypatch.setattr(tool, "needs", lambda made: {"registers": 8, "spilled": 0, "shared": 0})
    monkeypatch.setattr(tool, "checks", lambda label, arch, made: complaints)
    one = launch(KERNELS)

    def ask(known, anew=False, launch=one):
        return tool.found_or_kept("add", "sm_90", launch, known, anew, None)

    known, wrong = ask(None)
    assert len(compiled) == 1 and not wrong and known["registers"] == 8
    assert ask(known) == (known, []) and len(compiled) == 1
    assert ask(known, anew=True) == (known, []) and len(compiled) == 2
    assert ask({**known, "digest": "0"}) == (known, []) and len(compiled) == 3
    changed = launch(KERNELS.replace("x + 1.0", "x + 2.0"))
    assert ask(known, launch=changed)[0]["digest"] != known["digest"] and len(compiled) == 4
    complaints.append("no mma.sync")
    found, wrong = ask(None)
    assert "digest" not in found and wrong == complaints, "compiled again until it is right"


def test_figures_that_differ_from_the_table_are_complaints(tool):
    figures = {"registers": 8, "spilled": 0, "shared": 16, "digest": "1"}
    table = {"add": {"sm_90": figures}}

    def against(same=True, **other):
        return tool.compare(table, {"add": {"sm_90": {**figures, **other}}}, same)

    assert not against() and not against(digest="2") and not against(registers=7, same=False)
    for name in ("registers", "shared"):
        assert against(**{name: 7})
    assert against(spilled=4) and not against(spilled=4, same=False)
    table["add"]["sm_90"] = {**figures, "spilled": 8}
    assert "spills" in against(same=False)[0]
    assert "not in the table" in tool.compare(table, {}, True)[0]


def test_every_row_of_the_table_has_a_digest():
    """Else its kernels are compiled in every run of the tests."""
    table = json.loads((ROOT / "tests" / "triton" / "registers.json").read_text())["kernels"]
    assert all("digest" in figures for row in table.values() for figures in row.values())
