"""Every CUDA kernel on every architecture, without a GPU: what the assembler says of it."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import cuda_budget, cuda_facts  # noqa: E402

pytestmark = pytest.mark.skipif(cuda_facts.native.find_cuda() is None, reason="no nvcc here")

FEW_RESULTS = ("quantized_linear", "sample", "decode_attention")  # a few where others write a row
QUICK = ("rope", ("90a",))  # compiled in every run, in some three seconds


@pytest.fixture(scope="module")
def found():
    """Recorded facts where they are of these sources and this compiler, else the compiler's."""
    made = cuda_budget.facts_of_all()
    compiled = [
        f"{stem}.{'-'.join(archs)}"
        for stem in made
        for archs in cuda_facts.groups()
        if cuda_budget.recorded(stem, archs, cuda_budget.read()) is None
    ]
    if compiled:
        hint = "`python tools/cuda_budget.py --write` spares the next run that"
        warnings.warn(f"compiled, as no facts of them are kept: {compiled}; {hint}", stacklevel=1)
    return made


@pytest.fixture(scope="module")
def disassembled(found):
    """As `found`, for tests of what only a disassembly shows."""
    for by_arch in found.values():
        for kernels in by_arch.values():
            if not all(set(facts) == set(cuda_facts.FACTS) for facts in kernels.values()):
                pytest.skip("no cuobjdump here (the CUDA toolkit and Triton have it)")
    return found


def test_needs_no_more_than_the_budget(found):
    """`python tools/cuda_budget.py --write` after a change that is meant to need more."""
    assert sorted(found) == cuda_facts.stems() and len(found) >= 9
    assert all(tuple(by_arch) == cuda_facts.ARCHS for by_arch in found.values())
    complaints = cuda_budget.difference(found, cuda_budget.read())
    assert not complaints, "\n".join(complaints)


def test_blocks_fit(found):
    for stem, by_arch in found.items():
        for arch, kernels in by_arch.items():
            for kernel, facts in kernels.items():
                where = f"{stem}, sm_{arch}: {kernel}"
                most = 255 if "tensor_kernel" in kernel else 128  # theirs hold fragments, loads
                assert facts["registers"] <= most, f"{where} uses {facts['registers']} registers"
                assert facts["shared"] <= 48 * 1024, f"{where}: {facts['shared']} bytes shared"


def test_wide_kernels_load_and_store_16_bytes(disassembled):
    """A kernel for aligned rows whose accesses were split would still be right, and slow."""
    narrow = re.compile(r"Layout<1,|_kernel<\w+(, \w+)*, 1\b|sum_runs|count_|total_|join_kernel")
    for stem, by_arch in disassembled.items():
        for arch, kernels in by_arch.items():
            wide = {k: facts for k, facts in kernels.items() if not narrow.search(k)}
            assert wide, f"{stem}: no kernel for aligned rows among {list(kernels)}"
            for kernel, facts in wide.items():
                where = f"{stem}, sm_{arch}: {kernel}"
                assert facts["wide_loads"] > 0, f"{where} has no 16-byte loads"
                if stem not in FEW_RESULTS:
                    assert facts["wide_stores"] > 0, f"{where} has no 16-byte stores"
            for kernel, facts in kernels.items():
                where = f"{stem}, sm_{arch}: {kernel}"
                assert facts["spilled"] or not facts["local"], f"{where} keeps an array in memory"


def test_products_run_on_tensor_cores(disassembled):
    for stem in ("decode_attention", "quantized_linear"):
        for arch, kernels in disassembled[stem].items():
            assert any("tensor_kernel" in kernel for kernel in kernels), stem
            for kernel, facts in kernels.items():
                wanted = "tensor_kernel" in kernel
                assert bool(facts["tensor_core"]) == wanted, f"sm_{arch}: {kernel}: {facts}"


def test_more_than_the_budget_is_a_complaint():
    facts = {"registers": 40, "spilled": 0, "shared": 64}
    made = {"x": {"80": {"k": facts}}}

    def budget(*row):
        return {"x": {"kernels": {"k": {"80": [*row]}}}}

    assert cuda_budget.difference(made, budget(40, 0, 64, 3, 2, 0, 0)) == []
    (said,) = cuda_budget.difference(made, budget(39, 0, 64, 3, 2, 0, 0))
    assert said == "x, sm_80: k: registers 40, budget 39"
    assert "not in the budget" in cuda_budget.difference(made, {})[0]


# ---- what is recorded ----------------------------------------------------------------------------


def test_the_compiler_says_what_is_recorded():
    """One file for one architecture is compiled whatever is known, so that this way stays open."""
    stem, archs = QUICK
    made = cuda_facts.compiled(stem, archs)
    known = cuda_budget.recorded(stem, archs, cuda_budget.read())
    if known is None:  # another compiler, or sources that have changed: `found` compiles them
        assert not cuda_budget.difference({stem: made}, cuda_budget.read())
    elif cuda_facts.cuobjdump() is None:
        budgeted = {k: [f[n] for n in cuda_facts.BUDGETED] for k, f in known["90a"].items()}
        assert {k: [*f.values()] for k, f in made["90a"].items()} == budgeted
    else:
        assert made == known


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The sources and the record where they may be changed, and no compiler but a witness."""
    csrc = tmp_path.resolve() / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    monkeypatch.setattr(cuda_facts, "CSRC", csrc)
    monkeypatch.setattr(cuda_budget, "BUDGET", tmp_path / "budget.json")
    monkeypatch.delenv("FASTLM_RECOMPILE", raising=False)
    asked = []

    def measured(stem, archs, *, anew=False):
        asked.append((stem, archs, anew))
        facts = dict.fromkeys(cuda_facts.FACTS, len(stem))
        return {arch: {f"{stem}_kernel": facts} for arch in archs}

    monkeypatch.setattr(cuda_facts, "measured", measured)
    cuda_budget.write(cuda_budget.table(cuda_budget.facts_of_all()))
    assert len(asked) == len(cuda_facts.stems()) * len(cuda_facts.groups())
    asked.clear()
    return csrc, asked


def test_what_is_recorded_is_not_compiled(copy, monkeypatch):
    _, asked = copy
    known = cuda_budget.facts_of_all()
    assert not asked and known["rope"]["89"] == {"rope_kernel": dict.fromkeys(cuda_facts.FACTS, 4)}
    everything = len(cuda_facts.stems()) * len(cuda_facts.groups())
    assert cuda_budget.facts_of_all(anew=True) == known
    monkeypatch.setenv("FASTLM_RECOMPILE", "1")
    assert cuda_budget.facts_of_all() == known
    assert len(asked) == 2 * everything and all(anew for *_, anew in asked)


@pytest.mark.parametrize(
    "file, stems",
    [
        ("cuda/rope.cu", {"rope"}),
        ("cuda/rope.cuh", {"rope", "rope_append"}),
        ("ops/sample.h", {"sample"}),
        ("cuda/norm_layout.cuh", {"rms_norm", "layer_norm"}),
        ("cpu/rope.h", set()),
        ("torch/cuda/rope.cpp", set()),
    ],
)
def test_a_changed_source_is_compiled(copy, file, stems):
    csrc, asked = copy
    (csrc / file).write_text((csrc / file).read_text() + "\n")
    cuda_budget.facts_of_all()
    groups = cuda_facts.groups()
    assert sorted(asked) == sorted((stem, archs, False) for stem in stems for archs in groups)


def test_another_compiler_or_flag_compiles_all(copy, monkeypatch):
    _, asked = copy
    everything = len(cuda_facts.stems()) * len(cuda_facts.groups())
    with monkeypatch.context() as other:
        other.setattr(cuda_facts, "compilers", lambda: "another")
        cuda_budget.facts_of_all()
    assert len(asked) == everything
    monkeypatch.setattr(cuda_facts.native, "NVCC_FLAGS", "-O2")
    cuda_budget.facts_of_all()
    assert len(asked) == 2 * everything


def test_an_edited_figure_is_not_believed(copy):
    _, asked = copy
    text = cuda_budget.BUDGET.read_text()
    edited = text.replace('"rope_kernel": {"80": [4, ', '"rope_kernel": {"80": [3, ')
    assert edited != text
    cuda_budget.BUDGET.write_text(edited)
    found = cuda_budget.facts_of_all()
    assert asked == [("rope", ("80", "86", "89"), False)]
    assert "rope, sm_80: rope_kernel: registers 4, budget 3" in cuda_budget.difference(
        found, cuda_budget.read()
    )


def test_the_digest_knows_every_file_the_compiler_reads():
    source = ROOT / "csrc/cuda/rope.cu"
    files = cuda_facts.sources(source)
    cuda_facts._check_sources(source, "kernels.fatbin : " + " \\\n ".join(map(str, files)))
    for wrong in (files[:-1], [*files, ROOT / "csrc/cuda/mma.cuh"]):
        with pytest.raises(RuntimeError, match="digest and the compiler differ"):
            cuda_facts._check_sources(source, ": " + " ".join(map(str, wrong)))
