"""The chooser, explain and info."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm import _ext, ops, settings
from fastlm.ops import _registry

X = torch.ones(2, 8)
NATIVE = pytest.mark.skipif("cpu" not in ops.implementations("rms_norm"), reason="no kernels")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_reference_is_always_there_and_last():
    for stem in _registry.stems():
        for device in ("cpu", "cuda", "meta"):
            assert ops.implementations(stem, device)[-1] == "reference"


def test_every_backend_has_a_known_name():
    for stem in _registry.stems():
        for backend in _registry.backends(stem):
            assert backend.name in settings.BACKENDS, (stem, backend)


@NATIVE
def test_chooses_the_first_that_can_run():
    with _registry.recording() as verdicts:
        ops.rms_norm(X)
        ops.rms_norm(X.double())
    assert [v.chosen for v in verdicts] == ["cpu", "reference"]
    assert verdicts[0].idle == ["reference"]
    assert verdicts[1].refused["cpu"] == ["takes float32, bfloat16, float16, not float64"]


@NATIVE
def test_a_stale_build_is_no_error(monkeypatch):
    monkeypatch.setattr(_ext, "native_stems", _ext.native_stems - {"rms_norm"})
    assert ops.implementations("rms_norm") == ["torch", "reference"]
    assert "built before this operator had any: build again" in fastlm.explain("rms_norm")


def test_forcing_a_backend():
    with ops.use_backend("reference"), _registry.recording() as verdicts:
        ops.rms_norm(X)
    assert verdicts[0].chosen == "reference"


def test_forcing_an_impossible_backend_names_the_reason():
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="serves cuda tensors, not cpu"):
        ops.rms_norm(X)
    uniform = torch.rand(2, dtype=torch.float64)
    with ops.use_backend("torch"), pytest.raises(RuntimeError, match="no such implementation"):
        ops.sample(X, uniform)


def test_forcing_ends_with_the_block_even_after_an_error():
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert _registry.forced() is settings.forced_backend()


def test_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="backend: expected one of cpu, cuda"),
        ops.use_backend("x"),
    ):
        pass
    done = python("import fastlm", FASTLM_BACKEND="quick")
    assert done.returncode != 0
    assert "FASTLM_BACKEND: expected one of cpu, cuda" in done.stderr


def test_environment_forces_the_backend():
    code = "import torch, fastlm; print(fastlm.explain('rms_norm', torch.ones(1, 4)))"
    done = python(code, FASTLM_BACKEND="reference")
    assert done.stdout.startswith("rms_norm on cpu, float32, weight=None: reference"), done.stderr


def test_explain_lists_an_operator():
    text = fastlm.explain("rms_norm")
    assert "rms_norm on cpu tensors, best first" in text
    assert "serves cuda tensors, not cpu" in text
    assert fastlm.explain(ops.rms_norm) == text
    assert repr(text) == str(text)
    assert fastlm.explain("gated_activation") == fastlm.explain("activation")


@NATIVE
def test_explain_runs_what_it_is_given():
    text = fastlm.explain(ops.rms_norm, X.double(), torch.ones(8))
    assert text.splitlines()[0] == "rms_norm on cpu, float64, weight=float32: reference"
    assert "takes float32, bfloat16, float16, not float64" in text
    text = fastlm.explain(lambda x: ops.rms_norm(ops.rms_norm(x)), X)
    assert "rms_norm on cpu, float32, weight=None: cpu  (2 times)" in text
    assert fastlm.explain(torch.sin, X) == "no operator of fastlm was called"


@pytest.mark.parametrize(
    "what, error, text",
    [
        ("fly", ValueError, "no operator 'fly'; there are: .*rms_norm"),
        ("use_backend", ValueError, "'use_backend' is no operator; there are: activation"),
        ("_registry", ValueError, "no operator '_registry'"),
        (3, TypeError, "operator's name, a function or a model, got int"),
    ],
)
def test_explain_refuses(what, error, text):
    with pytest.raises(error, match=text):
        fastlm.explain(what)


def test_info_says_what_runs():
    facts = fastlm.info()
    assert facts["torch"] == torch.__version__
    assert set(facts["CPU backends"]) == set(_registry.stems())
    assert facts["threads"] == torch.get_num_threads()
    for name in facts:
        assert f"{name}:" in str(facts)


def test_info_names_a_preloaded_allocator(tmp_path):
    library = tmp_path / "libjemalloc.so.2"
    source = tmp_path / "empty.c"
    source.write_text("")
    try:
        subprocess.run(["gcc", "-shared", "-o", library, source], check=True)
    except FileNotFoundError:
        pytest.skip("no gcc")
    done = python(
        "import fastlm; print(fastlm.info()['memory allocator'])", LD_PRELOAD=str(library)
    )
    assert done.stdout.strip() == "jemalloc", done.stderr


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'fastlm' has no attribute 'fly'"):
        _ = fastlm.fly


def test_a_slower_backend_stands_back_but_can_be_forced(monkeypatch):
    slow = _registry.Backend("torch", (), lambda dtype: [], lambda dtype: ["twice the time"])
    monkeypatch.setitem(_registry._backends, "try_out", [])
    _registry.register("try_out", slow)
    with _registry.recording() as verdicts:
        assert _registry.choose("try_out", X) == "reference"
    assert verdicts[0].refused == {"torch": ["twice the time"]}
    with ops.use_backend("torch"):
        assert _registry.choose("try_out", X) == "torch"
