"""Every CUDA kernel on every architecture, without a GPU: what the assembler says of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import cuda_budget  # noqa: E402

pytestmark = pytest.mark.skipif(cuda_budget.native.find_cuda() is None, reason="no nvcc here")

FEW_RESULTS = ("quantized_linear", "sample", "decode_attention")  # a few where others write a row


@pytest.fixture(scope="module")
def found():
    return cuda_budget.compile_all()


def test_needs_no_more_than_the_budget(found):
    """`python tools/cuda_budget.py --write` after a change that is meant to need more."""
    assert len(found) >= 2
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


def test_wide_kernels_load_and_store_16_bytes(found):
    """A kernel for aligned rows whose accesses were split would still be right, and slow."""
    if cuda_budget.cuobjdump() is None:
        pytest.skip("no cuobjdump here (the CUDA toolkit and Triton have it)")
    narrow = re.compile(r"Layout<1,|_kernel<\w+(, \w+)*, 1\b|sum_runs|count_|total_|join_kernel")
    for stem, by_arch in found.items():
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


def test_products_run_on_tensor_cores(found):
    if cuda_budget.cuobjdump() is None:
        pytest.skip("no cuobjdump here (the CUDA toolkit and Triton have it)")
    for stem in ("decode_attention", "quantized_linear"):
        for arch, kernels in found[stem].items():
            assert any("tensor_kernel" in kernel for kernel in kernels), stem
            for kernel, facts in kernels.items():
                wanted = "tensor_kernel" in kernel
                assert bool(facts["tensor_core"]) == wanted, f"sm_{arch}: {kernel}: {facts}"


def test_more_than_the_budget_is_a_complaint():
    facts = {"registers": 40, "spilled": 0, "shared": 64}
    made = {"x": {"80": {"k": facts}}}
    assert cuda_budget.difference(made, {"x": {"k": {"80": [40, 0, 64]}}}) == []
    (said,) = cuda_budget.difference(made, {"x": {"k": {"80": [39, 0, 64]}}})
    assert said == "x, sm_80: k: registers 40, budget 39"
    assert "not in the budget" in cuda_budget.difference(made, {})[0]
