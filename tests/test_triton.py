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
PARTS = 3
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
@pytest.mark.parametrize("part", range(PARTS))
def test_in_the_interpreter(part):
    """A few processes for all tests: each pays seconds of imports."""
    how = ("-p", "no:cacheprovider", f"--share={part + 1}/{PARTS}")
    run("-m", "pytest", "tests/triton", *how, TRITON_INTERPRET="1")


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


class Compiled:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, stream: self.launches.append((grid, args, stream))


def on_no_gpu(monkeypatch):
    """The device and stream of CPU tensors, and a Triton of no known version."""
    from fastlm.triton import _launch

    monkeypatch.setattr(_launch, "_current_device", lambda: -1)
    monkeypatch.setattr(_launch, "_current_stream", lambda device: 7)
    monkeypatch.setattr("triton.__version__", "3.9.0")


def launched(function, way, warmup):
    """A kernel whose compiler is replaced, and how it is launched: in Python, or in C."""
    from fastlm.triton._launch import Kernel

    if way == "native" and _ext.native is None:
        pytest.skip(f"{_ext.native_error}")
    kernel = Kernel(function)
    kernel.function.warmup = warmup
    launch = kernel.quick() if way == "native" else kernel
    assert (launch is kernel) == (way == "python")
    return kernel, launch


WAYS = pytest.mark.parametrize("way", ["python", "native"])


@NEEDS_TRITON
@WAYS
def test_compiled_kernels_are_kept_by_what_they_depend_on(monkeypatch, way):
    import triton.language as tl

    from fastlm.triton._configs import Config

    def add(x, y, n, BLOCK: tl.constexpr, FAST: tl.constexpr):
        pass

    asked, launches = [], []

    def warmup(*args, **options):
        asked.append(options)
        return Compiled(launches)

    on_no_gpu(monkeypatch)
    _, kernel = launched(add, way, warmup)
    x, grid, config = torch.zeros(64), (3, 1, 1), Config((64,), 2)
    call = {"BLOCK": 64, "FAST": True}
    for _ in range(3):
        kernel(grid, (x, None), (64,), config, **call)
    assert len(asked) == 1 and asked[0]["num_warps"] == 2
    assert launches == [(grid, (x.data_ptr(), 0, 64, 64, True), 7)] * 3
    kernel((0, 1, 1), (x, None), (64,), config, **call)
    assert len(launches) == 3, "an empty grid"
    others = [
        ((x[1:], None), (64,), config, call),
        ((x, x), (64,), config, call),
        ((x, x[1:]), (64,), config, call),
        ((x[1:], x), (64,), config, call),
        ((x.half(), None), (64,), config, call),
        ((x, None), (65,), config, call),
        ((x, None), (64,), Config((64,), 4), call),
        ((x, None), (64,), config, {**call, "FAST": False}),
        ((x.bfloat16(), None), (64,), config, call),  # as wide as the half before
        ((x.int(), None), (64,), config, call),  # as wide as fp32
        ((x, None), (-64,), config, call),
        ((x, None), (2**40,), config, call),
        ((x, None), (0.5,), config, call),
        ((x, None), (-0.5,), config, call),
        ((x, None), (0x3FE0000000000000,), config, call),  # the bits of 0.5
        ((x, None), (2**70,), config, call),
        ((x, None), (-1,), config, call),
    ]
    for number, (tensors, numbers, how, constants) in enumerate(others, 2):
        for _ in range(2):
            kernel(grid, tensors, numbers, how, **constants)
        assert len(asked) == number
    with pytest.raises(TypeError, match="add: constants must be BLOCK, FAST in this order"):
        kernel(grid, (x, None), (66,), config, FAST=True, BLOCK=64)
    with pytest.raises(TypeError, match="add: constants must be BLOCK, FAST in this order"):
        kernel(grid, (x, None), (66,), config, BLOCK=64)
    kernel(grid, (torch.nn.Parameter(x), None), (64,), config, **call)
    assert launches[-1] == launches[0], "a Parameter is a tensor like any other"


@NEEDS_TRITON
def test_a_key_that_outlives_its_objects_matches_no_other(monkeypatch):
    """What the native cache knows by its address it keeps alive."""
    from triton.language import constexpr

    from fastlm.triton._configs import Config

    def add(x, n, KIND: constexpr):
        pass

    asked = []

    def warmup(*args, **options):
        asked.append(None)  # nothing that would keep them alive
        return Compiled([])

    on_no_gpu(monkeypatch)
    _, launch = launched(add, "native", warmup)
    x = torch.zeros(4)
    for number in range(50):  # each freed before the next is made, unless it is kept
        launch((1, 1, 1), (x,), (4,), Config((number,), 1), KIND="kind")
        launch((1, 1, 1), (x,), (4,), Config((0,), 1), KIND=(number, "kind"))
    assert len(asked) == 100


@NEEDS_TRITON
def test_plans_are_dropped_when_there_are_many(monkeypatch):
    from fastlm.triton import _launch
    from fastlm.triton._configs import Config

    def add(x, n):
        pass

    asked = []

    def warmup(*args, **options):
        asked.append(args[1])
        return Compiled([])

    on_no_gpu(monkeypatch)
    monkeypatch.setattr(_launch, "_MOST", 3)
    for way in ("python", "native"):
        _, launch = launched(add, way, warmup)
        asked.clear()
        x, config = torch.zeros(4), Config((4,))
        for n in (0, 1, 2, 2, 3, 3, 0):
            launch((1, 1, 1), (x,), (n,), config)
        assert asked == [0, 1, 2, 3, 0], way


@NEEDS_TRITON
@WAYS
def test_an_error_of_the_launcher_or_the_compiler_is_raised(monkeypatch, way):
    from fastlm.triton._configs import Config

    def add(x, n):
        pass

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("out of resources")

    def warmup(x, n, **options):
        if n == 1:
            raise ValueError("no such thing")
        return Broken()

    on_no_gpu(monkeypatch)
    _, launch = launched(add, way, warmup)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of resources"):
            launch((1, 1, 1), (torch.zeros(4),), (4,), Config((4,)))
        with pytest.raises(ValueError, match="no such thing"):
            launch((1, 1, 1), (torch.zeros(4),), (1,), Config((4,)))


@NEEDS_TRITON
@WAYS
def test_profilers_and_recorders_are_seen(monkeypatch, way):
    from fastlm.triton import _launch
    from fastlm.triton._configs import Config

    def add(x, n):
        pass

    enter, leave, seen = [], [], []
    on_no_gpu(monkeypatch)
    monkeypatch.setattr(_launch, "_ENTER", enter)
    monkeypatch.setattr(_launch, "_EXIT", leave)
    plain, profiled = (lambda *a, word=word: seen.append(word) for word in ("plain", "profiled"))
    plan = _launch.Plan(plain, (), (), True, profiled)
    monkeypatch.setattr(_launch, "planned", lambda *args: plan)
    kernel, launch = launched(add, way, lambda *args, **options: None)
    x, config = torch.zeros(4), Config((4,))
    for hooks in (enter, leave):
        launch((1, 1, 1), (x,), (4,), config)
        hooks.append(print)
        launch((1, 1, 1), (x,), (4,), config)
        hooks.clear()
    with _launch.recording("sm_90") as recorded:
        launch((1, 1, 1), (torch.empty(4, device="meta"),), (4,), config)
    launch((1, 1, 1), (x,), (4,), config)
    assert [r.kernel for r in recorded] == [kernel]
    assert seen == ["plain", "profiled", "plain", "profiled", "plain"]


@NEEDS_TRITON
@pytest.mark.parametrize("nested", [True, False], ids=["one tuple", "flat"])
def test_both_ways_hand_over_the_same(monkeypatch, nested):
    """Whatever form Triton's function in C takes its arguments in."""
    from fastlm.triton import _launch
    from fastlm.triton._configs import Config

    def add(x, y, z, n, factor):
        pass

    calls = []
    on_no_gpu(monkeypatch)

    def planned(compiled, rest):
        middle = ("function", False, None, (4, 1, 0))
        return _launch.Plan(lambda *args: calls.append(args), middle, rest, nested, print)

    monkeypatch.setattr(_launch, "planned", planned)
    x = torch.zeros(64, dtype=torch.float8_e4m3fn)
    tensors = (x[3:], None, torch.zeros(2, dtype=torch.bool), torch.zeros(0))
    for way in ("python", "native"):
        launch = launched(add, way, lambda *args, **options: None)[1]
        for _ in range(2):
            launch((3, 2, 1), tensors, (4, 0.5), Config((4,)))
    assert calls.count(calls[0]) == 4
    pointers = (x.data_ptr() + 3, 0, tensors[2].data_ptr(), 0, 4, 0.5)
    end = (pointers,) if nested else pointers
    assert calls[0] == (3, 2, 1, 7, "function", False, None, (4, 1, 0), *end)


@NEEDS_TRITON
def test_on_amd_the_size_of_the_memory_counts(monkeypatch):
    """There Triton takes 32-bit offsets for tensors that lie within 2 GB."""
    from fastlm.triton import _launch
    from fastlm.triton._configs import Config

    def add(x, n):
        pass

    asked = []

    def warmup(*args, **options):
        asked.append(args)
        return Compiled([])

    on_no_gpu(monkeypatch)
    monkeypatch.setattr(_launch, "_SIZED", True)
    monkeypatch.setattr(_launch, "_NEAR", 31)
    kernel = _launch.Kernel(add)
    kernel.function.warmup = warmup
    assert kernel.quick() is kernel
    for x in (torch.zeros(4), torch.zeros(8)[:4], torch.zeros(4), torch.zeros(8)[:4]):
        kernel((1, 1, 1), (x, None), (4,), Config((4,)))
    assert len(asked) == 2


@NEEDS_TRITON
@WAYS
def test_a_device_that_is_not_current_is_made_so_for_the_launch(monkeypatch, way):
    import contextlib

    from fastlm.triton import _launch
    from fastlm.triton._configs import Config

    on_no_gpu(monkeypatch)
    current, streams, launches = [3], [], []

    @contextlib.contextmanager
    def guard(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    def stream(device):
        streams.append((device, current[0]))
        return 7

    monkeypatch.setattr(_launch, "_current_device", lambda: current[0])
    monkeypatch.setattr(_launch, "_current_stream", stream)
    monkeypatch.setattr("torch.cuda.device", guard)

    def add(x, n):
        pass

    _, kernel = launched(add, way, lambda *args, **options: Compiled(launches))
    x = torch.zeros(4)  # whose device has the number -1
    kernel((1, 1, 1), (x,), (4,), Config((4,)))
    assert streams == [(-1, -1)] and len(launches) == 1 and current == [3]


@NEEDS_TRITON
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "profiled"])
def test_the_short_way_to_the_launcher_hands_over_what_triton_would(monkeypatch, hooked):
    """Triton's own launch of a kernel and ours, up to the function in C, which is replaced."""
    from types import SimpleNamespace

    from triton.backends.nvidia import driver as nvidia
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from fastlm.triton import _launch

    calls, seen = [], []
    in_c = SimpleNamespace(launch=lambda *args: calls.append(args))
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **kw: in_c, raising=False)
    if hasattr(nvidia, "library_dirs"):
        monkeypatch.setattr(nvidia, "library_dirs", list)
    if hasattr(nvidia, "make_kernel_signature"):  # is in C
        monkeypatch.setattr(nvidia, "make_kernel_signature", tuple)
        monkeypatch.setattr(nvidia, "annotate_arguments", list)
    active = SimpleNamespace(utils=in_c)
    monkeypatch.setattr(type(driver), "active", active)
    names = ["x", "y", "n", "BLOCK"]
    types = ["*fp32", "constexpr", "i32", "constexpr"]
    source = SimpleNamespace(
        fn=SimpleNamespace(arg_names=names, launch_metadata=None),
        signature=dict(zip(names, types, strict=True)),
        constants={},
    )
    sizes = ("global_scratch_size", "profile_scratch_size")
    metadata = SimpleNamespace(
        **dict.fromkeys(sizes, 0),
        global_scratch_align=1,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=True,
    )
    made = object.__new__(CompiledKernel)
    made._run, made.module = nvidia.CudaLauncher(source, metadata), "loaded"
    made.function, made.packed_metadata = 12345, (4, 1, 0)
    made.src, made.name = source, "add"
    if hooked:
        monkeypatch.setattr(_launch, "_ENTER", [1])

        def triton_s(kernel, grid):
            return lambda *args, stream: seen.append(args)

        monkeypatch.setattr(CompiledKernel, "__getitem__", triton_s)
        _launch.planned(made, (64, 128)).launch((3, 1, 1), 7, [4096, 0])
        assert seen == [(4096, 0, 64, 128)] and not calls, "a profiler sees Triton's own launch"
        return
    _launch.planned(made, (64, 128)).launch((3, 1, 1), 7, [4096, 0])
    made[3, 1, 1](4096, 0, 64, 128, stream=7)

    def plain(x):
        return None if type(x).__name__ in ("HookChain", "LazyDict") else x

    ours, theirs = ([plain(x) for x in call] for call in calls)
    assert ours == theirs and 12345 in ours
