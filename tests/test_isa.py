"""Every instruction set this machine offers, forced in its own process, on every operator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm import _ext, ops, reference
from fastlm.testing import check

pytestmark = pytest.mark.skipif(_ext.native is None, reason="no native kernels")
ALL = ("baseline", "avx2", "avx512", "avx512bf16")
SUPPORTED = _ext.native.supported_isas() if _ext.native else []


def cases(dtype):
    """name -> (function of a namespace of operators, inputs): ragged widths, a few rows."""

    def randn(*shape):
        return torch.randn(shape, dtype=dtype)

    angles = torch.randn(5, 20)
    return {
        "rms_norm": (lambda o, *a: o.rms_norm(*a), [randn(5, 77), randn(77)]),
        "layer_norm": (lambda o, *a: o.layer_norm(*a), [randn(5, 77), randn(77), randn(77)]),
        "rope": (
            lambda o, q, k: o.rope(q, k, angles.cos().to(q), angles.sin().to(q)),
            [randn(2, 3, 5, 40), randn(2, 1, 5, 40)],
        ),
        "activation": (lambda o, x: o.activation(x, "gelu"), [randn(5, 77)]),
        "gated_activation": (
            lambda o, *a: o.gated_activation(*a, "silu"),
            [randn(5, 77), randn(5, 77)],
        ),
        "attention": (
            lambda o, *a: o.attention(*a, causal=True),
            [randn(1, 2, 19, 40), randn(1, 1, 37, 40), randn(1, 1, 37, 40)],
        ),
        "linear": (lambda o, *a: o.linear(*a), [randn(3, 77), randn(45, 77), randn(45)]),
        "feed_forward": (
            lambda o, *a: o.feed_forward(*a, activation="gelu_tanh"),
            [randn(3, 40), randn(77, 40), randn(40, 77)],
        ),
        "cross_entropy": (
            lambda o, x: o.cross_entropy(x, torch.arange(5)),
            [randn(5, 77)],
        ),
        "decode_attention": (
            lambda o, *a: o.decode_attention(*a, torch.tensor([50, 33])),
            [randn(2, 2, 1, 40), randn(2, 2, 50, 40), randn(2, 2, 50, 40)],
        ),
    }


def self_check(isa: str) -> None:
    """Runs in the forced process: the kernels of this set against float64."""
    assert _ext.native.cpu_isa() == isa
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for name, (call, inputs) in cases(dtype).items():
            try:
                check(
                    lambda *a, call=call: call(ops, *a),
                    lambda *a, call=call: call(reference, *a),
                    lambda *a, call=call: call(reference, *a),
                    inputs,
                    gradients=name != "decode_attention",
                )
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}, {isa}: {error}") from None
    print("checked", isa)


def forced(isa: str, code: str) -> subprocess.CompletedProcess:
    folders = [Path(__file__).parent, Path(fastlm.__file__).parents[1]]
    environment = {
        **os.environ,
        "FASTLM_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", SUPPORTED)
def test_every_operator_on_a_forced_set(isa):
    done = forced(isa, f"import test_isa; test_isa.self_check({isa!r})")
    assert done.stdout.strip() == f"checked {isa}", done.stderr


def test_best_set_is_the_default():
    code = "from fastlm import _ext; print(_ext.native.cpu_isa())"
    assert forced("", code).stdout.strip() == SUPPORTED[-1]


@pytest.mark.parametrize("isa", ["sse9", *(i for i in ALL if i not in SUPPORTED)])
def test_impossible_set_is_refused(isa):
    done = forced(isa, "import fastlm")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    if isa == "sse9":
        expected = "expected baseline, avx2, avx512 or avx512bf16, got sse9"
    else:
        expected = f"this processor or build has no {isa}"
    assert last == f"RuntimeError: FASTLM_CPU_ISA: {expected}"
