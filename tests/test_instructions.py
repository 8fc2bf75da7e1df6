"""The guard against slower kernels that a busy machine cannot blur: instruction counts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fastlm import _ext

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("instructions", ROOT / "tools/instructions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_take_no_more_instructions_than_the_baseline(tool):
    if _ext.native is None:
        pytest.skip("no native kernels")
    baseline = json.loads(tool.BASELINE.read_text())
    if baseline["compiler"] != tool.version():
        pytest.skip(f"the baseline is of {baseline['compiler']}, here is {tool.version()}")
    try:
        counts = tool.count(ROOT)
    except tool.Unavailable as reason:
        pytest.skip(str(reason))
    table, good = tool.compare(baseline["counts"], counts)
    assert good, f"\n{table}\nIf that is meant: python tools/instructions.py --write"


def test_costs_of_callees_count_and_others_do_not(tool):
    profile = """fl=a.cpp
fn=main
0 100
cfn=measured_norm
calls=1 0
0 57

fn=measured_norm
0 7
cfn=kernel
calls=2 0
0 50

fn=kernel
+3 50
"""
    assert tool.inclusive(profile) == {"norm": 57}


def test_growth_is_refused_and_named(tool):
    before = {"norm": 1000, "rope": 1000}
    assert tool.compare(before, {"norm": 1009, "rope": 500})[1]
    table, good = tool.compare(before, {"norm": 1020, "rope": 1000})
    assert not good and "norm" in table and "+2.0%  MORE" in table
    assert not tool.compare(before, {"norm": 1000})[1]
    assert "no baseline" in tool.compare({}, {"new": 5})[0]
