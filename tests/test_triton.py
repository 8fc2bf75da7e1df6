"""Triton's kernels without a GPU: run in the interpreter, compiled for every architecture."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm import _ext, ops

ROOT = Path(__file__).resolve().parent.parent
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (extra test)"
)
OLD = importlib.util.find_spec("triton") and importlib.metadata.version("triton") < "3.7"


def run(*command: str, **environment: str) -> None:
    """Runs Python in a process of its own, and shows all it says where it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_TRITON
@pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 fails with NumPy 2.4")
@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests" / "triton").glob("test_*.py")), ids=lambda file: file.stem
)
def test_in_the_interpreter(file):
    run("-m", "pytest", str(file), "-p", "no:cacheprovider", TRITON_INTERPRET="1")


@NEEDS_TRITON
def test_compiles_for_every_architecture():
    run("tools/compile_kernels.py")


def test_is_listed_and_explained(monkeypatch):
    if importlib.util.find_spec("triton"):
        assert "triton" in ops.implementations("rms_norm", "cuda")
    assert "triton" not in ops.implementations("rms_norm", "cpu")
    monkeypatch.setattr(_ext, "triton_error", lambda: "Triton is not installed")
    assert "triton" not in ops.implementations("rms_norm", "cuda")
    assert "triton    Triton is not installed" in fastlm.explain("rms_norm")


class Driver:
    """Stands for Triton's, with a device on which CPU tensors lie."""

    def __init__(self):
        self.launches = []

    def get_current_device(self):
        return -1

    def get_current_stream(self, device):
        return 7


class Compiled:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, stream: self.launches.append((grid, args, stream))


@NEEDS_TRITON
def test_compiled_kernels_are_kept_by_what_they_depend_on(monkeypatch):
    import triton.language as tl
    from triton.runtime import driver

    from fastlm.triton._configs import Config
    from fastlm.triton._launch import Kernel

    def add(x, y, n, BLOCK: tl.constexpr, FAST: tl.constexpr):
        pass

    kernel = Kernel(add)
    asked, here = [], Driver()

    def warmup(*args, **options):
        asked.append(options)
        return Compiled(here.launches)

    monkeypatch.setattr(type(driver), "active", here)
    monkeypatch.setattr(kernel.function, "warmup", warmup)
    x, grid, config = torch.zeros(64), (3, 1, 1), Config((64,), 2)
    call = {"BLOCK": 64, "FAST": True}
    for _ in range(3):
        kernel(grid, (x, None), (64,), config, **call)
    assert len(asked) == 1 and asked[0]["num_warps"] == 2
    assert here.launches == [(grid, (x.data_ptr(), None, 64, 64, True), 7)] * 3
    kernel((0, 1, 1), (x, None), (64,), config, **call)
    assert len(here.launches) == 3, "an empty grid"
    others = [
        ((x[1:], None), (64,), config, call),
        ((x, x), (64,), config, call),
        ((x, x[1:]), (64,), config, call),
        ((x[1:], x), (64,), config, call),
        ((x.half(), None), (64,), config, call),
        ((x, None), (65,), config, call),
        ((x, None), (64,), Config((64,), 4), call),
        ((x, None), (64,), config, {**call, "FAST": False}),
    ]
    for number, (tensors, numbers, how, constants) in enumerate(others, 2):
        for _ in range(2):
            kernel(grid, tensors, numbers, how, **constants)
        assert len(asked) == number
    with pytest.raises(TypeError, match="add: constants must be BLOCK, FAST in this order"):
        kernel(grid, (x, None), (66,), config, FAST=True, BLOCK=64)
